"""The benchmark command stays alive: the smallest run, its file, and wrong arguments."""

import json
import re

import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks import cases, traffic

QUICK = ["--quick", "--shape", "8x32", "--dtype", "float32", "--peers", "jaxbn", "linen"]


def test_smallest_run(tmp_path, capsys):
    page, picture = tmp_path / "page.md", tmp_path / "picture.png"
    page.write_text("before\n<!-- begin times -->\nold\n<!-- end times -->\nafter\n")
    files = ["--json", str(tmp_path / "run.json"), "--plot", str(picture)]
    command.main([*QUICK, "--passes", "gradient+relu", *files, "--markdown", str(page)])

    found = json.loads((tmp_path / "run.json").read_text())
    assert {"date", "machine", "versions", "allocator", "floor", "skipped"} <= set(found)
    (row,) = found["rows"]
    assert (row["shape"], row["units"], row["missing"]) == ([8, 32], 8, {})
    assert set(row["seconds"]) == {"floor", "jaxbn", "linen"}
    assert all(min(seconds) > 0 for seconds in row["seconds"].values())
    assert set(row["ratios"]) == {"jaxbn/floor", "linen/floor", "jaxbn/linen"}
    assert (len(found["residuals"]), len(found["compile"])) == (6, 2)
    assert {"import jax", "import jaxbn"} <= set(found["import"])

    text = page.read_text()
    assert text.startswith("before\n<!-- begin times -->\n\n* 20")
    assert text.endswith("|\n\n<!-- end times -->\nafter\n")
    assert "| 8x32 " in text
    assert capsys.readouterr().out in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    command.main(["--read", str(tmp_path / "run.json")])
    assert capsys.readouterr().out in text


@pytest.mark.parametrize(
    ("arguments", "fact", "remedy"),
    [
        (["--shape", "8"], "'8'", "Write 32x56x56x64"),
        (["--shape", "8x0"], "'8x0'", "Write 32x56x56x64"),
        (["--rounds", "0"], "'0'.*positive", "Give 1"),
        (["--peers", "linen"], "jaxbn", "name it too"),
        (["--passes", "backward"], "backward", "choose from"),
        (["--json", "absent/run.json"], "no folder absent", "Make it"),
        (["--read", "absent.json"], "absent.json", "with --json"),
        (["--markdown", "absent.md"], "absent.md", "begin times"),
    ],
)
def test_wrong_arguments(arguments, fact, remedy, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    message = " ".join(capsys.readouterr().err.split("error: ")[1].split())
    assert ended.value.code == 2
    assert re.search(f"{fact}.*{remedy}", message)


def test_floor_moves_the_bytes_of_every_pass():
    from tests.benchmarks.floor import Floor

    for what in cases.PASSES:
        Floor(cases.Case("layer", (8, 32), "NC", "float32", what)).times(1)


# A fusion that slices one operand and reads the other, a product, and returned arguments.
PROGRAM = """
HloModule jit_f

%fused (a: f32[8,4], b: bf16[8,4]) -> f32[8] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %slice.1 = f32[8,1]{1,0} slice(%a), slice={[0:8], [0:1]}
  ROOT %add = f32[8]{0} custom(%slice.1, %b)
}

ENTRY %main (x: f32[8,4], y: bf16[8,4]) -> (f32[8], f32[8,4]) {
  %x = f32[8,4]{1,0} parameter(0)
  %y = bf16[8,4]{1,0} parameter(1)
  %f = f32[8]{0} fusion(%x, %y), kind=kLoop, calls=%fused
  %copy.1 = f32[8,4]{1,0} copy(%x)
  %gemm = f32[8,8]{1,0} custom-call(%x, %x), custom_call_target="__cublas$gemm"
  ROOT %t = (f32[8]{0}, f32[8,4]{1,0}) tuple(%f, %copy.1)
}
"""


def test_bytes_of_kernels():
    fusion, product = traffic.kernels(PROGRAM)
    assert (fusion.read, fusion.written, fusion.matmul) == (8 * 4 + 32 * 2, 8 * 4, False)
    assert (product.read, product.written, product.matmul) == (32 * 4, 64 * 4, True)

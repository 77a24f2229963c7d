"""The numbers at which a finding begins, for the checks and for the picture."""

# A decay below this is taken for the weight of the new batch, which PyTorch calls momentum.
MOMENTUM = 0.5
# Statistics drift if the means lie so many standard deviations from the batches, or the
# standard deviations differ by so large a factor.
SHIFT, STRETCH = 0.4, 1.6
# Batches are small if their means lie so many standard deviations apart: 1 / sqrt(6).
NOISE = 0.4
# Evaluation may be off by so many standard deviations of the output beside another cause,
# and by so many where every layer is within its own limits.
GAP, GAP_ALONE = 0.5, 1.0
# Statistics have not converged if more than this share of the initial ones is left.
LEFT = 0.05
# Evaluation agrees with the batches if its loss exceeds theirs by no more than this share.
LOSS = 0.25

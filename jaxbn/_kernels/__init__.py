"""What touches x: the reduction and the map, one file per platform for the formulations."""

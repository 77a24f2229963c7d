"""What the layers for both APIs of Flax share."""

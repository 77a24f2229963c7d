"""What the layers of all frameworks share: x as they take it, and leaves by their names."""

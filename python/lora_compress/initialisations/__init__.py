"""What factors are before the first step of training: the interface, and what ships with this package."""

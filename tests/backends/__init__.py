"""What every backend must do, and the engine over any of them."""

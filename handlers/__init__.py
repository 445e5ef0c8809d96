"""What one task does: admission, the request message, the images, training and testing."""

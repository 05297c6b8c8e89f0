"""Where received bytes go: written, compared, dropped, or made into tensors."""

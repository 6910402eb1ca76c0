"""What ROME and AlphaEdit share: finding keys and values at a request's subject."""

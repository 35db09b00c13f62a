"""The layers every transformer here is made of."""

"""The commands, one module each, thin: parse, load, open the platform, one call."""

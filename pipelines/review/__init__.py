"""The reviewing process: a page on which people judge captions, and the table of what they said."""

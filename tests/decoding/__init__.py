"""The room decoding: one file per module."""

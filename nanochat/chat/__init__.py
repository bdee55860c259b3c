"""Talking to a trained model: in a terminal (cli) and over HTTP (web)."""

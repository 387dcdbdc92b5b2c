"""Engines: something that runs a segment on a device."""

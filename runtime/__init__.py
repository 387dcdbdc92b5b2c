"""The part an embedded device installs: bundles, memories, gates, engines, generation."""

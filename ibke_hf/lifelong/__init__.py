"""Many edits of one model: a library of them on disk, and a router that finds those that a prompt is about."""

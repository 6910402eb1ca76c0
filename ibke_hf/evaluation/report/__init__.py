"""Tables, pages and plots of scores; reads files, never runs a model."""

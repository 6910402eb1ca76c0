"""An edit on its way to where a model is served: exports, facts as a test suite, and what an edit does to the rest."""

"""What an edit is and how one is made; needs torch and transformers alone, and travels as an editor's remote code."""

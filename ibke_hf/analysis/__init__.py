"""The paper's figures: what is measured, then how it is drawn, and what it says of the paper's claims."""

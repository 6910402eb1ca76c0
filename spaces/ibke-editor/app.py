"""The page of `ibke_hf`, with the editor and the model that IBKE_EDITOR and IBKE_BACKBONE name; by default Atlas, without a download."""

from ibke_hf.app.page import launch

if __name__ == "__main__":
    launch()

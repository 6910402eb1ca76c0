"""The page of `ibke_hf`, with the editor and model of IBKE_EDITOR and IBKE_BACKBONE; by default Atlas."""

from ibke_hf.app.page import launch

if __name__ == "__main__":
    launch()

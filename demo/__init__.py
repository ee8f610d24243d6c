"""`python -m demo`: two real transformers, dense against 2:4, measured on this machine."""

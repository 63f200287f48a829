"""The mathematics of Llama 4. Read `llama4.py` first; it is the whole model on one page."""

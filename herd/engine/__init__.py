"""From prompts to replies: sequences, pages, a scheduler, a sampler, and one step that ties them. `engine.py` is the loop."""

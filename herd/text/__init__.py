"""Words and pictures to tokens and back: tokenizers, prompts, images, tools and calls, grammars, streaming text. No model needed."""

"""Words and pictures to tokens and back: tokenizers, the prompt renderer, image tiles, the detokenizer, tools and their calls, grammars. No model needed."""

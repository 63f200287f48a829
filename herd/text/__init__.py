"""Words and pictures to tokens and back: tokenizers, the prompt renderer, image tiles, the detokenizer. No model needed."""

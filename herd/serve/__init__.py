"""OpenAI's API over any `herd.chat.Backend`. It knows no model and no engine, and never imports torch."""

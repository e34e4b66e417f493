"""Between text and token ids: tokenizers, detokenizing, stop strings, chat templates. Free of torch."""

"""Tokenizers: SentencePiece-unigram with sentinels, and bytes."""

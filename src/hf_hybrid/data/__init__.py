"""From raw text to training examples: loading, packing, span corruption, the embedded corpus."""

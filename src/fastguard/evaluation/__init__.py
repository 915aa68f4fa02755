"""What a defense bought and what it cost: refusal, compliance, losses, perplexity, trainability, crossings."""

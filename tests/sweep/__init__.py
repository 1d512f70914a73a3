"""Every family of transformers, tiny: cutting its files has to equal bypassing its blocks in memory."""

"""What all contrastive losses share: the global batch, sums over its pairs, agreement between ranks."""

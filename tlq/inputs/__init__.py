"""What a model sees: images as pixels and chats as tokens, the same in calibration, evaluation and serving."""

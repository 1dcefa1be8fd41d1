"""Token importance: from gradients to the weight w_t of every token in the calibration objective.

In order: ``gradients`` scores the tokens, ``pool`` holds tokens and scores in flat arrays, ``weighting`` turns the
scores of one layer and group into weights, ``token_set`` draws the token-level calibration set, ``token_weights`` does
both for all layers and groups and writes the weights of the micro-batches.
"""

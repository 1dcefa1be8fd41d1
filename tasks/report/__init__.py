"""Stage `report`: what quantization cost, as a page, as pictures, and as a card in every checkpoint.

| module     | what it does                                                              |
|------------|---------------------------------------------------------------------------|
| `results`  | reads what the other stages left, once                                    |
| `tokens`   | importance and the token-level set, over samples and by layer             |
| `charts`   | draws results on matplotlib axes                                          |
| `inline`   | makes a figure a part of the page that follows its light and dark colours |
| `page`     | report/index.html                                                         |
| `cards`    | model cards, and how they come into the checkpoints                       |
"""

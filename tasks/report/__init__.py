"""Stage `report`: show the loss from quantization on a page, in pictures, and on a model card in every checkpoint.

| module     | what it does                                                              |
|------------|---------------------------------------------------------------------------|
| `results`  | reads the results of the other stages once                                |
| `answers`  | chooses example answers that changed, with their questions and pictures   |
| `tokens`   | prepares importance and the token-level set, over samples and by layer    |
| `charts`   | draws results on matplotlib axes                                          |
| `inline`   | embeds a figure into the page, with the page's light and dark colours     |
| `page`     | writes report/index.html                                                  |
| `cards`    | writes model cards and copies them into the checkpoints                   |
"""

"""A model behind HTTP: images in, names, boxes or masks out, many requests in one batch.

model.py      what is compiled at start, how an image becomes a row of a batch, what is said of it
batches.py    the bounded queue, and the one thread that runs programs
body.py       images of a request, within bounds
app.py        the ASGI application
metrics.py    counts in Prometheus' format
openapi.py    the description of the interface, and its page
page.py       the page on which a person drops photos
"""

/* One token of a whole HAMT model on a CPU, for programs without Python.
 *
 * A model is one block of bytes, the file model.hamt that `hamt export --format c` writes; it stays
 * the caller's, and has to stay where it is, at a multiple of 64 bytes, as mmap puts it. States are
 * the caller's, too: what a step leaves in them is all that there is of the text. Functions may be
 * called from several threads, with states of their own.
 */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct hamt_model hamt_model;

/* The state of one layer for some rows, contiguous float32: slots (rows, heads, slots, features),
 * position (rows, heads, key size) or NULL without rotation, conv (rows, taps - 1, width) or NULL
 * without a convolution. Zeros have read nothing. */
typedef struct {
  float *slots, *position, *conv;
} hamt_layer;

/* How many floats each of these has for one row, 0 where there are none; layers, and tokens. */
typedef struct {
  int64_t slots, position, conv, layers, vocab;
} hamt_sizes;

/* NULL if the bytes hold no model that this version reads. */
hamt_model *hamt_open(const void *bytes, int64_t count);
void hamt_close(hamt_model *model);
hamt_sizes hamt_sizes_of(const hamt_model *model);

/* The parts of a step: all layers and the last norm on hidden states (rows, width), which are
 * replaced; and logits of what has come out. They return 0, or 2 if there is no memory for it. */
int hamt_run(const hamt_model *model, int64_t rows, float *hidden, const hamt_layer *layers,
             int64_t threads);
int hamt_head(const hamt_model *model, int64_t rows, const float *normed, float *logits,
              int64_t threads);

/* Read one token in each row: states go on, logits (rows, vocab) are of the next tokens.
 * Returns 0, 1 if a token is none of the vocabulary, and then nothing has changed, or 2 if there is
 * no memory for it. */
int hamt_step(const hamt_model *model, int64_t rows, const int64_t *tokens, const hamt_layer *layers,
              float *logits, int64_t threads);

#ifdef __cplusplus
}
#endif

/* Continues token ids with a model of HAMT: the likeliest next ones, without Python.
 *
 *   c++ -O3 -march=native -std=c++17 -fopenmp -c step.cpp
 *   cc -O2 continue.c step.o -fopenmp -lstdc++ -lm -o continue
 *   ./continue model.hamt 20 5 17 301        20 more tokens after 5, 17 and 301
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "step.h"

static float *zeros(int64_t count) { return count ? calloc((size_t)count, sizeof(float)) : NULL; }

static int64_t likeliest(const float *logits, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; i++)
    if (logits[i] > logits[best]) best = i;
  return best;
}

static int number(const char *word, int64_t *value) {
  char *end;
  *value = strtoll(word, &end, 10);
  return end != word && !*end;
}

int main(int count, char **words) {
  int64_t left, token = 0;
  if (count < 4 || !number(words[2], &left)) {
    fprintf(stderr, "usage: %s model.hamt TOKENS_TO_WRITE ID [ID ...]\n", words[0]);
    return 2;
  }
  int file = open(words[1], O_RDONLY);
  struct stat status;
  if (file < 0 || fstat(file, &status)) {
    perror(words[1]);
    return 1;
  }
  void *bytes = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  hamt_model *model = bytes == MAP_FAILED ? NULL : hamt_open(bytes, status.st_size);
  if (!model) {
    fprintf(stderr, "%s holds no model that this program reads\n", words[1]);
    return 1;
  }
  /* All that the model carries from token to token, however long the text. */
  hamt_sizes sizes = hamt_sizes_of(model);
  hamt_layer *layers = calloc((size_t)sizes.layers, sizeof(hamt_layer));
  for (int64_t l = 0; l < sizes.layers; l++)
    layers[l] = (hamt_layer){zeros(sizes.slots), zeros(sizes.position), zeros(sizes.conv)};
  float *logits = zeros(sizes.vocab);

  for (int word = 3; word < count; word++) {
    if (!number(words[word], &token) || hamt_step(model, 1, &token, layers, logits, 1)) {
      fprintf(stderr, "%s is no token: they are from 0 to %lld\n", words[word], (long long)sizes.vocab - 1);
      return 1;
    }
  }
  for (; left > 0; left--) {
    token = likeliest(logits, sizes.vocab);
    printf("%lld ", (long long)token);
    fflush(stdout);
    hamt_step(model, 1, &token, layers, logits, 1);
  }
  printf("\n");
  for (int64_t l = 0; l < sizes.layers; l++) {
    free(layers[l].slots);
    free(layers[l].position);
    free(layers[l].conv);
  }
  free(layers);
  free(logits);
  hamt_close(model);
  return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* The header in plain C99: client PROGRAM INPUT EXPECTED, files of raw elements. */
#include "hetconv.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const char* what) {
  fprintf(stderr, "client: %s\n", what);
  return 1;
}

static int read_all(const char* path, void* to, size_t bytes) {
  FILE* file = fopen(path, "rb");
  size_t found = file ? fread(to, 1, bytes, file) : 0;
  if (file) fclose(file);
  return found == bytes;
}

int main(int argc, char** argv) {
  hc_program* program;
  hc_tensor x, y;
  const void* inputs[1];
  void *outputs[1], *input, *expected;
  int same;
  if (argc != 4) return fail("expected a program, an input and what comes of it");
  if (hc_load("no such file", &program) != HC_FILE || program) return fail("it loaded nothing");
  if (!strstr(hc_error(), "no such file")) return fail("the error does not name the file");
  if (hc_load(argv[1], &program) != HC_OK) return fail(hc_error());
  if (hc_input(program, 0, &x) != HC_OK || hc_output(program, 0, &y) != HC_OK)
    return fail(hc_error());
  inputs[0] = input = malloc(x.bytes);
  outputs[0] = malloc(y.bytes);
  expected = malloc(y.bytes);
  if (!read_all(argv[2], input, x.bytes) || !read_all(argv[3], expected, y.bytes))
    return fail("a file is missing, or too short");
  if (hc_run(program, inputs, outputs, 0) != HC_OK) return fail(hc_error());
  same = memcmp(outputs[0], expected, y.bytes) == 0;
  hc_free(program);
  free(input);
  free(outputs[0]);
  free(expected);
  return same ? 0 : fail("another result");
}

/* The shortest embedding of libdsv3: open a model, complete a text, free. See stream.c for events.
 *
 *   cc complete.c $(pkg-config --cflags --libs dsv3) -o complete
 *   ./complete model.dsv3 'def mean(values):'
 */
#include <dsv3.h>
#include <stdio.h>

int main(int argc, char **argv) {
  dsv3_model *model = NULL;
  dsv3_context *context = NULL;
  dsv3_error *error = NULL;
  char *text = NULL;
  if (argc == 3 && dsv3_model_open(argv[1], NULL, &model, &error) == DSV3_OK &&
      dsv3_context_create(model, NULL, &context, &error) == DSV3_OK &&
      dsv3_complete(context, argv[2], DSV3_NUL_TERMINATED, NULL, 0, NULL, &text, NULL, &error) ==
          DSV3_OK) {
    puts(text);
  } else {
    fprintf(stderr, "%s\n", argc == 3 ? dsv3_error_message(error) : "usage: complete MODEL TEXT");
  }
  const int failed = text == NULL;
  dsv3_string_free(text);
  dsv3_context_free(context);
  dsv3_model_free(model);
  dsv3_error_free(error);
  return failed;
}

// A plugin of QEMU that counts the AArch64 instructions a program runs between two marks: `hint #97` starts a count, `hint #98` prints it and
// starts over. One line for each count: all instructions, and those of straight pieces of code that multiply and add vectors of floats (fmla),
// which is to say of inner loops. The declarations are those of QEMU's plugin interface, version 1, that are used, in our own words.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb* tb, size_t index);
const void* qemu_plugin_insn_data(const struct qemu_plugin_insn* insn);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*translated)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb* tb, void (*run)(unsigned, void*), int flags, void* data);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn* insn, void (*run)(unsigned, void*), int flags, void* data);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum { kNoRegisters = 0, kHintBegin = 97, kHintEnd = 98 };

typedef struct Block {
  uint64_t instructions, inner;
} Block;

static int counting;
static uint64_t instructions, inner;

static void block_runs(unsigned cpu, void* data) {
  const Block* const block = data;
  (void)cpu;
  if (!counting) return;
  instructions += block->instructions;
  inner += block->inner;
}

static void begin(unsigned cpu, void* data) {
  (void)cpu;
  (void)data;
  instructions = inner = 0;
  counting = 1;
}

static void end(unsigned cpu, void* data) {
  (void)cpu;
  (void)data;
  counting = 0;
  printf("counted %llu %llu\n", (unsigned long long)instructions, (unsigned long long)inner);
  fflush(stdout);
}

// FMLA of vectors, by vector or by element, of single or half precision (Arm Architecture Reference Manual, C7).
static int multiplies(uint32_t word) {
  return (word & 0xbfa0fc00u) == 0x0e20cc00u || (word & 0xbfe0fc00u) == 0x0e400c00u || (word & 0xbf80f400u) == 0x0f801000u ||
         (word & 0xbfc0f400u) == 0x0f001000u;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb* tb) {
  const size_t count = qemu_plugin_tb_n_insns(tb);
  Block* const block = calloc(1, sizeof *block);  // lives as long as the program
  int found = 0;
  (void)id;
  if (!block) abort();
  for (size_t i = 0; i < count; ++i) {
    struct qemu_plugin_insn* const insn = qemu_plugin_tb_get_insn(tb, i);
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(insn), sizeof word);
    found |= multiplies(word);
    for (uint32_t hint = kHintBegin; hint <= kHintEnd; ++hint) {
      if (word != (0xd503201fu | hint << 5)) continue;
      qemu_plugin_register_vcpu_insn_exec_cb(insn, hint == kHintBegin ? begin : end, kNoRegisters, NULL);
    }
  }
  block->instructions = count;
  block->inner = found ? count : 0;
  qemu_plugin_register_vcpu_tb_exec_cb(tb, block_runs, kNoRegisters, block);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void* info, int argc, char** argv) {
  (void)info;
  (void)argc;
  (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  return 0;
}

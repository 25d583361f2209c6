/* The part of the CUDA runtime that page-locks host memory, on machines without a GPU.

   A locked range keeps the pages that it had when it was locked: a second mapping of them stays, also when the range is
   unmapped and other memory appears at its address. That is where `stand_in_write` writes, as a GPU's copy would. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713 };
enum { REGISTER = 0, UNREGISTER = 1, CALLS = 2, MOST = 4096 };

struct range { char *address; size_t size; char *pages; };

static struct range ranges[MOST];
static int used, fails_after[CALLS], fails_with[CALLS], fails_times[CALLS];
static unsigned long contexts;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int last_error, device;

static int ended(int code) {
    pthread_mutex_unlock(&lock);
    if (code) last_error = code;
    return code;
}

/* Begin a call: return the code that a test has injected for it. A call creates a context on the thread's device. */
static int begun(int call) {
    pthread_mutex_lock(&lock);
    contexts |= 1ul << device;
    if (fails_times[call] == 0 || fails_after[call]-- > 0) return SUCCESS;
    fails_times[call]--;
    fails_after[call] = 0;
    return fails_with[call];
}

int cudaSetDevice(int index) { device = index; contexts |= 1ul << index; return SUCCESS; }
int cudaGetDevice(int *index) { *index = device; return SUCCESS; }
int cudaPeekAtLastError(void) { return last_error; }
int cudaGetLastError(void) { int code = last_error; last_error = SUCCESS; return code; }

const char *cudaGetErrorString(int code) {
    switch (code) {
        case SUCCESS: return "no error";
        case INVALID_VALUE: return "invalid argument";
        case 2: return "out of memory";
        case ALREADY_REGISTERED: return "part or all of the requested memory range is already mapped";
        case NOT_REGISTERED: return "pointer does not correspond to a registered memory region";
        default: return "unknown error";
    }
}

int cudaHostRegister(void *address, size_t size, unsigned flags) {
    char *start = address;
    int code = begun(REGISTER);
    (void)flags;
    if (code) return ended(code);
    for (int i = 0; i < used; i++)
        if (start < ranges[i].address + ranges[i].size && ranges[i].address < start + size) return ended(ALREADY_REGISTERED);
    if (used == MOST) return ended(2);
    char *pages = mremap(address, 0, size, MREMAP_MAYMOVE); /* an old size of 0 maps the same pages once more */
    if (pages == MAP_FAILED) return ended(INVALID_VALUE);
    ranges[used++] = (struct range){start, size, pages};
    return ended(SUCCESS);
}

int cudaHostUnregister(void *address) {
    int code = begun(UNREGISTER);
    if (code) return ended(code);
    for (int i = 0; i < used; i++)
        if (ranges[i].address == (char *)address) {
            munmap(ranges[i].pages, ranges[i].size);
            ranges[i] = ranges[--used];
            return ended(SUCCESS);
        }
    return ended(NOT_REGISTERED);
}

/* ---- what only tests call */

/* Let a call fail with a code, so many times, after so many successful ones. */
void stand_in_fail(int call, int code, int after, int times) {
    fails_after[call] = after;
    fails_with[call] = code;
    fails_times[call] = times;
}

unsigned long stand_in_contexts(void) { return contexts; }

size_t stand_in_locked_bytes(void) {
    size_t sum = 0;
    for (int i = 0; i < used; i++) sum += ranges[i].size;
    return sum;
}

int stand_in_is_locked(const char *start, size_t size) {
    for (int i = 0; i < used; i++)
        if (ranges[i].address <= start && start + size <= ranges[i].address + ranges[i].size) return 1;
    return 0;
}

/* Write to host memory as a GPU does. A copy may not leave the range that it begins in. */
int stand_in_write(char *target, const char *source, size_t size) {
    for (int i = 0; i < used; i++) {
        struct range *range = &ranges[i];
        if (target + size <= range->address || range->address + range->size <= target) continue;
        if (target < range->address || range->address + range->size < target + size) return INVALID_VALUE;
        memcpy(range->pages + (target - range->address), source, size);
        return SUCCESS;
    }
    memcpy(target, source, size);
    return SUCCESS;
}

void stand_in_reset(void) {
    for (int i = 0; i < used; i++) munmap(ranges[i].pages, ranges[i].size);
    used = 0;
    contexts = 0;
    memset(fails_times, 0, sizeof fails_times);
    last_error = device = 0;
}

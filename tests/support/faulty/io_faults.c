/* Makes calls on chosen files fail: LD_PRELOAD of a whole run. Settings are read at every call, from the environment.

   IO_FAULT_PATH   glob of the whole path, as *@(one|other); `*` matches slashes too; without it nothing fails
   IO_FAULT_CALLS  which calls, of: open write sync rename truncate mkdir, read: opening to read, files or folders, and
                   stat: asking for a file and removing or linking it; comma-separated
   IO_FAULT_KIND   an errno; "short": one write takes half of its bytes, later ones nothing (ENOSPC); "slow": 20 ms more;
                   "hang": nothing until the file IO_FAULT_HOLD is gone
   IO_FAULT_HOLD   the file for whose life calls hang, or for whose life alone they fail
   IO_FAULT_FIRST  the first of the matching calls of this process that fails, from 1
   IO_FAULT_LAST   the last one
   IO_FAULT_RANK   only in the process of this rank
   IO_FAULT_LOG    file to which "CALL PATH" is appended for every fault, so that a test knows that it struck
*/
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int calls; /* one thread at a time writes any one file; an inexact count is good enough */

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static void note(const char *call, const char *path) {
    const char *log = getenv("IO_FAULT_LOG");
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", call, path);
    int file = log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
    if (file >= 0) {
        syscall(SYS_write, file, line, (size_t)length);
        syscall(SYS_close, file);
    }
}

/* 0: go on; an errno: fail with it; -1: take half. */
static int fault(const char *call, const char *path) {
    const char *pattern = getenv("IO_FAULT_PATH"), *which = getenv("IO_FAULT_CALLS"), *rank = getenv("IO_FAULT_RANK");
    if (!pattern || !which || !path || !strstr(which, call) || fnmatch(pattern, path, FNM_EXTMATCH)) return 0;
    if (rank && (!getenv("RANK") || strcmp(rank, getenv("RANK")))) return 0;
    const char *first = getenv("IO_FAULT_FIRST"), *last = getenv("IO_FAULT_LAST"), *kind = getenv("IO_FAULT_KIND");
    const char *hold = getenv("IO_FAULT_HOLD");
    if (!strcmp(kind, "hang")) {
        if (hold && !access(hold, F_OK)) note(call, path);
        while (hold && !access(hold, F_OK)) usleep(5000);
        return 0;
    }
    if (hold && access(hold, F_OK)) return 0;
    int begin = first ? atoi(first) : 1, number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (number < begin || (last && number > atoi(last))) return 0;
    note(call, path);
    if (!strcmp(kind, "slow")) {
        usleep(20000);
        return 0;
    }
    if (!strcmp(kind, "short")) return number == begin && !strcmp(call, "write") ? -1 : ENOSPC;
    return atoi(kind);
}

static int fault_of(const char *call, int descriptor) {
    if (!getenv("IO_FAULT_PATH")) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fault(call, path);
}

static int fault_at(const char *call, int folder, const char *name) {
    if (!getenv("IO_FAULT_PATH")) return 0;
    char path[2 * PATH_MAX], base[PATH_MAX] = "", link[64];
    if (name[0] != '/') {
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
            base[length < 0 ? 0 : length] = 0;
        }
        snprintf(path, sizeof path, "%s/%s", base, name);
    } else {
        snprintf(path, sizeof path, "%s", name);
    }
    return fault(call, path);
}

#define FAIL_IF(found)        \
    do {                      \
        int failure = found;  \
        if (failure > 0) {    \
            errno = failure;  \
            return -1;        \
        }                     \
    } while (0)

#define MODE_OF(flags)                         \
    mode_t mode = 0;                           \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {   \
        va_list rest;                          \
        va_start(rest, flags);                 \
        mode = va_arg(rest, mode_t);           \
        va_end(rest);                          \
    }

#define WRITES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR))

int open(const char *path, int flags, ...) {
    MODE_OF(flags)
    FAIL_IF(fault_at(WRITES(flags) ? "open" : "read", AT_FDCWD, path));
    return REAL(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE_OF(flags)
    FAIL_IF(fault_at(WRITES(flags) ? "open" : "read", AT_FDCWD, path));
    return REAL(open64)(path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...) {
    MODE_OF(flags)
    FAIL_IF(fault_at(WRITES(flags) ? "open" : "read", folder, path));
    return REAL(openat)(folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
    MODE_OF(flags)
    FAIL_IF(fault_at(WRITES(flags) ? "open" : "read", folder, path));
    return REAL(openat64)(folder, path, flags, mode);
}

ssize_t write(int file, const void *data, size_t size) {
    int why = fault_of("write", file);
    if (why < 0) return REAL(write)(file, data, size / 2);
    FAIL_IF(why);
    return REAL(write)(file, data, size);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    int why = fault_of("write", file);
    if (why < 0) return REAL(pwrite64)(file, data, size / 2, at);
    FAIL_IF(why);
    return REAL(pwrite64)(file, data, size, at);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    int why = fault_of("write", file);
    if (why < 0) return REAL(write)(file, parts[0].iov_base, parts[0].iov_len / 2);
    FAIL_IF(why);
    return REAL(writev)(file, parts, count);
}

int fsync(int file) {
    FAIL_IF(fault_of("sync", file));
    return REAL(fsync)(file);
}

int fdatasync(int file) {
    FAIL_IF(fault_of("sync", file));
    return REAL(fdatasync)(file);
}

int ftruncate64(int file, off64_t size) {
    FAIL_IF(fault_of("truncate", file));
    return REAL(ftruncate64)(file, size);
}

int truncate64(const char *path, off64_t size) {
    FAIL_IF(fault_at("truncate", AT_FDCWD, path));
    return REAL(truncate64)(path, size);
}

int rename(const char *from, const char *to) {
    FAIL_IF(fault_at("rename", AT_FDCWD, to));
    return REAL(rename)(from, to);
}

int renameat(int from_folder, const char *from, int folder, const char *to) {
    FAIL_IF(fault_at("rename", folder, to));
    return REAL(renameat)(from_folder, from, folder, to);
}

int mkdir(const char *path, mode_t mode) {
    FAIL_IF(fault_at("mkdir", AT_FDCWD, path));
    return REAL(mkdir)(path, mode);
}

DIR *opendir(const char *path) {
    int failure = fault_at("read", AT_FDCWD, path);
    if (failure > 0) {
        errno = failure;
        return NULL;
    }
    return REAL(opendir)(path);
}

#define ASKS(result, name, parameters, folder, path, arguments) \
    result name parameters {                                    \
        FAIL_IF(fault_at("stat", folder, path));                \
        return REAL(name) arguments;                            \
    }

ASKS(int, stat, (const char *path, struct stat *found), AT_FDCWD, path, (path, found))
ASKS(int, stat64, (const char *path, struct stat64 *found), AT_FDCWD, path, (path, found))
ASKS(int, lstat, (const char *path, struct stat *found), AT_FDCWD, path, (path, found))
ASKS(int, lstat64, (const char *path, struct stat64 *found), AT_FDCWD, path, (path, found))
ASKS(int, fstatat, (int folder, const char *path, struct stat *found, int flags), folder, path,
     (folder, path, found, flags))
ASKS(int, fstatat64, (int folder, const char *path, struct stat64 *found, int flags), folder, path,
     (folder, path, found, flags))
ASKS(int, unlink, (const char *path), AT_FDCWD, path, (path))
ASKS(int, unlinkat, (int folder, const char *path, int flags), folder, path, (folder, path, flags))
ASKS(int, link, (const char *from, const char *to), AT_FDCWD, to, (from, to))
ASKS(ssize_t, readlink, (const char *path, char *to, size_t size), AT_FDCWD, path, (path, to, size))

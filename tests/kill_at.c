/* LD_PRELOAD library: SIGKILLs the process before its k-th change of the file system below a directory.
 *
 *     kill_at(directory, k)   starts counting; k = 0 only counts
 *     kill_count()            changes so far, in this process and its forks
 *
 * A write of more than one byte is done by half before the kill, as a full page cache or a power cut would have it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long *counter; /* shared with forks */
static long target;
static char place[PATH_MAX];

__attribute__((constructor)) static void start(void) {
    counter = mmap(NULL, sizeof *counter, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void kill_at(const char *directory, long k) {
    strncpy(place, directory, sizeof place - 1);
    *counter = 0;
    target = k;
}

long kill_count(void) { return *counter; }

static int below(int folder, const char *path) {
    char base[PATH_MAX] = "", link[64];
    if (!place[0] || !path) return 0;
    if (path[0] == '/') return !strncmp(path, place, strlen(place));
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, base, sizeof base - 1);
        if (size < 0) return 0;
        base[size] = 0;
    }
    return !strncmp(base, place, strlen(place));
}

static int due(void) { return __atomic_add_fetch(counter, 1, __ATOMIC_SEQ_CST) == target; }
static void before(int folder, const char *path) {
    if (below(folder, path) && due()) kill(getpid(), SIGKILL);
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define CHANGES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (flags & CHANGES) before(AT_FDCWD, path); \
        return real(path, flags, mode); \
    }
OPEN(open) OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (flags & CHANGES) before(folder, path); \
        return real(folder, path, flags, mode); \
    }
OPENAT(openat) OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, #name, const char *, const char *); \
        if (strpbrk(mode, "wa+")) before(AT_FDCWD, path); \
        return real(path, mode); \
    }
FOPEN(fopen) FOPEN(fopen64)

ssize_t write(int file, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (place[0] && below(file, "") && due()) {
        real(file, data, size / 2);
        kill(getpid(), SIGKILL);
    }
    return real(file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (place[0] && below(file, "") && due()) {
        real(file, parts, count / 2);
        kill(getpid(), SIGKILL);
    }
    return real(file, parts, count);
}

#define ON_PATH(name, types, names, folder, path) \
    int name types { \
        int (*real) types = (int (*) types)dlsym(RTLD_NEXT, #name); \
        before(folder, path); \
        return real names; \
    }
ON_PATH(rename, (const char *from, const char *to), (from, to), AT_FDCWD, to)
ON_PATH(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), b, to)
ON_PATH(unlink, (const char *path), (path), AT_FDCWD, path)
ON_PATH(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, path)
ON_PATH(rmdir, (const char *path), (path), AT_FDCWD, path)
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(fchmodat, (int folder, const char *path, mode_t mode, int flags), (folder, path, mode, flags), folder, path)
ON_PATH(ftruncate, (int file, off_t size), (file, size), file, "")
ON_PATH(ftruncate64, (int file, off64_t size), (file, size), file, "")
ON_PATH(fsync, (int file), (file), file, "")

/* Preloaded into a process: counts what it does to files below one directory, and at one of these
 * operations ends the process, or lets the operation fail, as a killed writer, a crashed machine or
 * a full disk would.
 *
 *     fault_arm(root, at, mode, error)    operations are counted from 0 again
 *     fault_count()                       how many there were
 *     fault_lose()                        what was not flushed is lost now
 *
 * Modes: COUNT only; KILL before operation `at` (half of a write is done); POWER: the same, and what
 * was written and not flushed is lost (a file is as long as when it was flushed); FAIL: operation `at` fails with `error`; FULL: so does every
 * one from `at` on that needs room.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, POWER, FAIL, FULL };
enum { DIRTY = 256 };

static char root[PATH_MAX];
static size_t root_length;
static long at, count;
static int mode, failure;
static char dirty[DIRTY][PATH_MAX];
/* What was flushed, and how long it was. */
static struct { dev_t device; ino_t node; off_t size; } safe[DIRTY];

#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static void forget(const char *path) {
    for (int i = 0; i < DIRTY; i++)
        if (!strcmp(dirty[i], path)) dirty[i][0] = 0;
}

static void remember(const char *path) {
    forget(path);
    for (int i = 0; i < DIRTY; i++)
        if (!dirty[i][0]) {
            strcpy(dirty[i], path);
            return;
        }
    abort();
}

/* A file or directory has another name: so have the files in it. */
static void renamed(const char *from, const char *to) {
    size_t length = strlen(from);
    for (int i = 0; i < DIRTY; i++)
        if (!strncmp(dirty[i], from, length) && (dirty[i][length] == '/' || !dirty[i][length])) {
            char changed[PATH_MAX];
            if (snprintf(changed, sizeof changed, "%s%s", to, dirty[i] + length) >= PATH_MAX) abort();
            strcpy(dirty[i], changed);
        }
}

void fault_lose(void) {
    for (int i = 0; i < DIRTY; i++)
        if (dirty[i][0]) {
            int was = mode;
            mode = OFF;
            struct stat now;
            off_t kept = 0;
            if (!stat(dirty[i], &now))
                for (int j = 0; j < DIRTY; j++)
                    if (safe[j].node == now.st_ino && safe[j].device == now.st_dev) kept = safe[j].size;
            if (truncate(dirty[i], kept) && errno != ENOENT) abort();
            mode = was;
        }
}

static int of_descriptor(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

static void absolute(int directory, const char *name, char *path) {
    char base[PATH_MAX] = "";
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) abort();
    } else {
        of_descriptor(directory, base);
    }
    if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) abort();
}

/* 0: go on. 1: end after half of it. -1: fail. */
static int next_is(const char *path, int needs_room) {
    if (mode == OFF || strncmp(path, root, root_length)) return 0;
    long number = count++;
    if (mode == FULL && number >= at && needs_room) return errno = failure, -1;
    if (number != at) return 0;
    if (mode == FAIL) return errno = failure, -1;
    if (mode == KILL || mode == POWER) return 1;
    return 0;
}

static void end(void) {
    if (mode == POWER) fault_lose();
    _exit(9);
}

void fault_arm(const char *directory, long number, int how, int error) {
    snprintf(root, sizeof root, "%s", directory);
    root_length = strlen(root);
    memset(dirty, 0, sizeof dirty);
    memset(safe, 0, sizeof safe);
    at = number, count = 0, failure = error, mode = how;
}

long fault_count(void) { return count; }

/* --- what takes a path --- */

static int checked(int directory, const char *name, int needs_room, char *path) {
    absolute(directory, name, path);
    int what = next_is(path, needs_room);
    if (what > 0) end();
    return what;
}

static int opened(int directory, const char *name, int flags) {
    char path[PATH_MAX];
    int changes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    if (mode == OFF || !changes) return 0;
    int what = checked(directory, name, 1, path);
    if (!what && !strncmp(path, root, root_length) && flags & (O_CREAT | O_TRUNC)) remember(path);
    return what;
}

#define MODE(flags) \
    mode_t bits = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        bits = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *name, int flags, ...) {
    NEXT(open);
    MODE(flags)
    return opened(AT_FDCWD, name, flags) ? -1 : next(name, flags, bits);
}

int open64(const char *name, int flags, ...) {
    NEXT(open64);
    MODE(flags)
    return opened(AT_FDCWD, name, flags) ? -1 : next(name, flags, bits);
}

int openat(int directory, const char *name, int flags, ...) {
    NEXT(openat);
    MODE(flags)
    return opened(directory, name, flags) ? -1 : next(directory, name, flags, bits);
}

int openat64(int directory, const char *name, int flags, ...) {
    NEXT(openat64);
    MODE(flags)
    return opened(directory, name, flags) ? -1 : next(directory, name, flags, bits);
}

int mkdir(const char *name, mode_t bits) {
    NEXT(mkdir);
    char path[PATH_MAX];
    return checked(AT_FDCWD, name, 1, path) ? -1 : next(name, bits);
}

int rmdir(const char *name) {
    NEXT(rmdir);
    char path[PATH_MAX];
    return checked(AT_FDCWD, name, 0, path) ? -1 : next(name);
}

int unlink(const char *name) {
    NEXT(unlink);
    char path[PATH_MAX];
    if (checked(AT_FDCWD, name, 0, path)) return -1;
    forget(path);
    return next(name);
}

int unlinkat(int directory, const char *name, int flags) {
    NEXT(unlinkat);
    char path[PATH_MAX];
    if (checked(directory, name, 0, path)) return -1;
    forget(path);
    return next(directory, name, flags);
}

int link(const char *from, const char *to) {
    NEXT(link);
    char path[PATH_MAX];
    return checked(AT_FDCWD, to, 1, path) ? -1 : next(from, to);
}

int linkat(int here, const char *from, int there, const char *to, int flags) {
    NEXT(linkat);
    char path[PATH_MAX];
    return checked(there, to, 1, path) ? -1 : next(here, from, there, to, flags);
}

int rename(const char *from, const char *to) {
    NEXT(rename);
    char path[PATH_MAX], old[PATH_MAX];
    if (checked(AT_FDCWD, to, 0, path)) return -1;
    absolute(AT_FDCWD, from, old);
    int done = next(from, to);
    if (!done) forget(path), renamed(old, path);
    return done;
}

int renameat2(int here, const char *from, int there, const char *to, unsigned flags) {
    NEXT(renameat2);
    char path[PATH_MAX], old[PATH_MAX], between[] = "//";
    if (checked(there, to, 0, path)) return -1;
    absolute(here, from, old);
    int done = next(here, from, there, to, flags);
    if (done) return done;
    if (flags & RENAME_EXCHANGE) renamed(path, between), renamed(old, path), renamed(between, old);
    else forget(path), renamed(old, path);
    return 0;
}

/* --- what takes a descriptor --- */

#define WRITING(half) \
    char path[PATH_MAX]; \
    if (mode != OFF && of_descriptor(fd, path)) { \
        int what = next_is(path, 1); \
        if (what < 0) return -1; \
        if (!strncmp(path, root, root_length)) remember(path); \
        if (what > 0) { \
            half; \
            end(); \
        } \
    }

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    WRITING(if (next(fd, data, size / 2) < 0) abort())
    return next(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    NEXT(writev);
    WRITING(if (next(fd, parts, n / 2) < 0) abort())
    return next(fd, parts, n);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    NEXT(pwrite);
    WRITING(if (next(fd, data, size / 2, offset) < 0) abort())
    return next(fd, data, size, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    NEXT(pwrite64);
    WRITING(if (next(fd, data, size / 2, offset) < 0) abort())
    return next(fd, data, size, offset);
}

ssize_t sendfile(int fd, int from, off_t *offset, size_t size) {
    NEXT(sendfile);
    WRITING((void)0)
    return next(fd, from, offset, size);
}

ssize_t sendfile64(int fd, int from, off64_t *offset, size_t size) {
    NEXT(sendfile64);
    WRITING((void)0)
    return next(fd, from, offset, size);
}

ssize_t copy_file_range(int from, off64_t *a, int fd, off64_t *b, size_t size, unsigned flags) {
    NEXT(copy_file_range);
    WRITING((void)0)
    return next(from, a, fd, b, size, flags);
}

int ftruncate(int fd, off_t size) {
    NEXT(ftruncate);
    WRITING((void)0)
    return next(fd, size);
}

int ftruncate64(int fd, off64_t size) {
    NEXT(ftruncate64);
    WRITING((void)0)
    return next(fd, size);
}

int posix_fallocate(int fd, off_t offset, off_t size) {
    NEXT(posix_fallocate);
    WRITING((void)0)
    return next(fd, offset, size);
}

static int flushed(int fd) {
    char path[PATH_MAX];
    if (mode == OFF || !of_descriptor(fd, path)) return 0;
    int what = next_is(path, 0);
    if (what > 0) end();
    struct stat now;
    if (!what && !strncmp(path, root, root_length) && !fstat(fd, &now)) {
        forget(path);
        int free = -1;
        for (int i = DIRTY - 1; i >= 0; i--) {
            int same = safe[i].node == now.st_ino && safe[i].device == now.st_dev;
            if (same || (free < 0 && !safe[i].node)) free = i;
            if (same) break;
        }
        if (free < 0) abort();
        safe[free].device = now.st_dev, safe[free].node = now.st_ino, safe[free].size = now.st_size;
    }
    return what;
}

int fsync(int fd) {
    NEXT(fsync);
    return flushed(fd) ? -1 : next(fd);
}

int fdatasync(int fd) {
    NEXT(fdatasync);
    return flushed(fd) ? -1 : next(fd);
}

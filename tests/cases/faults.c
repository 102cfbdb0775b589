/* A file system that fails when it is told to: preloaded into a process that writes.

   Operations that change files below one folder are counted, over all processes that were forked
   since `fault_arm`. At the N-th the process dies, dies with half of its bytes written, or is told
   that the disk is full, the quota used up, or the device broken. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, KILL = -1, TORN = -2 }; /* else an errno */
enum { GROWS, CHANGES };                  /* what needs room, and what does not */

struct state {
    long count;    /* operations so far */
    long at;       /* the one that fails, from 1 */
    int what;      /* COUNT, KILL, TORN, or an errno */
    int armed;
    long hits;     /* how many were refused */
    char last[64]; /* name of the operation that failed first */
    char root[PATH_MAX];
};

static struct state *state;

__attribute__((constructor)) static void start(void)
{
    void *shared = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    state = shared == MAP_FAILED ? NULL : shared;
}

/* Count from now on, below a folder (absolute, without links), and fail at an operation. */
void fault_arm(const char *root, int what, long at)
{
    memset(state, 0, sizeof *state);
    strncpy(state->root, root, sizeof state->root - 1);
    state->what = what;
    state->at = at;
    state->armed = 1;
}

void fault_disarm(void) { state->armed = 0; }
long fault_count(void) { return state->count; }
long fault_hits(void) { return state->hits; }
const char *fault_last(void) { return state->last; }

static int below(const char *path)
{
    size_t length = strlen(state->root);
    return strncmp(path, state->root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int counts_path(int folder, const char *path)
{
    char whole[2 * PATH_MAX], link[64];
    if (!state || !state->armed || !path)
        return 0;
    if (path[0] == '/')
        return below(path);
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, PATH_MAX))
            return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, whole, PATH_MAX - 1);
        if (size < 0)
            return 0;
        whole[size] = 0;
    }
    strcat(whole, "/");
    strncat(whole, path, PATH_MAX - 1);
    return below(whole);
}

static int counts(int file)
{
    char link[64], path[PATH_MAX];
    if (!state || !state->armed)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return below(path);
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* 0: go on; TORN: write half, then die; an errno: refuse. */
static int fails(int kind, const char *name)
{
    long now = __atomic_add_fetch(&state->count, 1, __ATOMIC_SEQ_CST);
    int full = state->what == ENOSPC || state->what == EDQUOT;
    if (state->what == COUNT || now < state->at)
        return 0;
    /* A full disk stays full, but lets go of what it has; a broken sector is met once. */
    if (full ? kind != GROWS : now > state->at)
        return 0;
    if (!state->hits++)
        snprintf(state->last, sizeof state->last, "%s", name);
    if (state->what == KILL || (state->what == TORN && kind != GROWS))
        die();
    return state->what;
}

#define REAL(type, name, ...)                                                                      \
    static type (*real)(__VA_ARGS__);                                                              \
    if (!real)                                                                                     \
    real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define REFUSE(failed, result)                                                                     \
    do {                                                                                           \
        if ((failed) == TORN)                                                                      \
            die();                                                                                 \
        if (failed) {                                                                              \
            errno = failed;                                                                        \
            return result;                                                                         \
        }                                                                                          \
    } while (0)

/* --- writing ---------------------------------------------------------------------------------- */

ssize_t write(int file, const void *bytes, size_t size)
{
    REAL(ssize_t, "write", int, const void *, size_t);
    int failed = counts(file) ? fails(GROWS, "write") : 0;
    if (failed == TORN && size > 1)
        real(file, bytes, size / 2);
    REFUSE(failed, -1);
    return real(file, bytes, size);
}

static ssize_t write_at(const char *name, int file, const void *bytes, size_t size, off_t offset)
{
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    int failed = counts(file) ? fails(GROWS, name) : 0;
    if (failed == TORN && size > 1)
        real(file, bytes, size / 2, offset);
    REFUSE(failed, -1);
    return real(file, bytes, size, offset);
}

ssize_t pwrite(int file, const void *bytes, size_t size, off_t offset)
{
    return write_at("pwrite", file, bytes, size, offset);
}

ssize_t pwrite64(int file, const void *bytes, size_t size, off_t offset)
{
    return write_at("pwrite64", file, bytes, size, offset);
}

ssize_t writev(int file, const struct iovec *parts, int count)
{
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    int failed = counts(file) ? fails(GROWS, "writev") : 0;
    if (failed == TORN && count > 1)
        real(file, parts, count / 2);
    REFUSE(failed, -1);
    return real(file, parts, count);
}

/* What libc buffers reaches its own write, which is not ours: it is counted where it is given. */
size_t fwrite(const void *bytes, size_t size, size_t count, FILE *file)
{
    REAL(size_t, "fwrite", const void *, size_t, size_t, FILE *);
    int failed = state && state->armed && counts(fileno(file)) ? fails(GROWS, "fwrite") : 0;
    if (failed == TORN) {
        real(bytes, size, count / 2, file);
        fflush(file);
    }
    REFUSE(failed, 0);
    return real(bytes, size, count, file);
}

ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t size, unsigned int flags)
{
    REAL(ssize_t, "copy_file_range", int, off_t *, int, off_t *, size_t, unsigned int);
    int failed = counts(out) ? fails(GROWS, "copy_file_range") : 0;
    if (failed == TORN && size > 1)
        real(in, from, out, to, size / 2, flags);
    REFUSE(failed, -1);
    return real(in, from, out, to, size, flags);
}

static ssize_t send_bytes(int out, int in, off_t *from, size_t size)
{
    REAL(ssize_t, "sendfile", int, int, off_t *, size_t);
    int failed = counts(out) ? fails(GROWS, "sendfile") : 0;
    if (failed == TORN && size > 1)
        real(out, in, from, size / 2);
    REFUSE(failed, -1);
    return real(out, in, from, size);
}

ssize_t sendfile(int out, int in, off_t *from, size_t size)
{
    return send_bytes(out, in, from, size);
}

ssize_t sendfile64(int out, int in, off_t *from, size_t size)
{
    return send_bytes(out, in, from, size);
}

/* --- durability and length -------------------------------------------------------------------- */

#define ON_FILE(name, kind)                                                                        \
    int name(int file)                                                                             \
    {                                                                                              \
        REAL(int, #name, int);                                                                     \
        int failed = counts(file) ? fails(kind, #name) : 0;                                        \
        REFUSE(failed, -1);                                                                        \
        return real(file);                                                                         \
    }

/* Some file systems look for room only now. */
ON_FILE(fsync, GROWS)
ON_FILE(fdatasync, GROWS)

#define LENGTH(name, type, first, counted)                                                         \
    int name(type first, off_t size)                                                               \
    {                                                                                              \
        REAL(int, #name, type, off_t);                                                             \
        int failed = counted ? fails(CHANGES, #name) : 0;                                          \
        REFUSE(failed, -1);                                                                        \
        return real(first, size);                                                                  \
    }

LENGTH(ftruncate, int, file, counts(file))
LENGTH(ftruncate64, int, file, counts(file))
LENGTH(truncate, const char *, path, counts_path(AT_FDCWD, path))
LENGTH(truncate64, const char *, path, counts_path(AT_FDCWD, path))

/* --- names ------------------------------------------------------------------------------------ */

static int fails_name(int kind, const char *name, int folder, const char *path)
{
    return counts_path(folder, path) ? fails(kind, name) : 0;
}

int rename(const char *from, const char *to)
{
    REAL(int, "rename", const char *, const char *);
    int failed = fails_name(GROWS, "rename", AT_FDCWD, to);
    REFUSE(failed, -1);
    return real(from, to);
}

int renameat(int here, const char *from, int there, const char *to)
{
    REAL(int, "renameat", int, const char *, int, const char *);
    int failed = fails_name(GROWS, "renameat", there, to);
    REFUSE(failed, -1);
    return real(here, from, there, to);
}

int renameat2(int here, const char *from, int there, const char *to, unsigned int flags)
{
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned int);
    int failed = fails_name(GROWS, "renameat2", there, to);
    REFUSE(failed, -1);
    return real(here, from, there, to, flags);
}

int link(const char *from, const char *to)
{
    REAL(int, "link", const char *, const char *);
    int failed = fails_name(GROWS, "link", AT_FDCWD, to);
    REFUSE(failed, -1);
    return real(from, to);
}

int linkat(int here, const char *from, int there, const char *to, int flags)
{
    REAL(int, "linkat", int, const char *, int, const char *, int);
    int failed = fails_name(GROWS, "linkat", there, to);
    REFUSE(failed, -1);
    return real(here, from, there, to, flags);
}

int symlink(const char *from, const char *to)
{
    REAL(int, "symlink", const char *, const char *);
    int failed = fails_name(GROWS, "symlink", AT_FDCWD, to);
    REFUSE(failed, -1);
    return real(from, to);
}

int unlink(const char *path)
{
    REAL(int, "unlink", const char *);
    int failed = fails_name(CHANGES, "unlink", AT_FDCWD, path);
    REFUSE(failed, -1);
    return real(path);
}

int unlinkat(int folder, const char *path, int flags)
{
    REAL(int, "unlinkat", int, const char *, int);
    int failed = fails_name(CHANGES, "unlinkat", folder, path);
    REFUSE(failed, -1);
    return real(folder, path, flags);
}

int rmdir(const char *path)
{
    REAL(int, "rmdir", const char *);
    int failed = fails_name(CHANGES, "rmdir", AT_FDCWD, path);
    REFUSE(failed, -1);
    return real(path);
}

int mkdir(const char *path, mode_t mode)
{
    REAL(int, "mkdir", const char *, mode_t);
    int failed = fails_name(GROWS, "mkdir", AT_FDCWD, path);
    REFUSE(failed, -1);
    return real(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode)
{
    REAL(int, "mkdirat", int, const char *, mode_t);
    int failed = fails_name(GROWS, "mkdirat", folder, path);
    REFUSE(failed, -1);
    return real(folder, path, mode);
}

/* --- opening: counted where it may make a file ------------------------------------------------- */

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...)                                                     \
    {                                                                                              \
        REAL(int, #name, const char *, int, ...);                                                  \
        mode_t mode = 0;                                                                           \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                     \
            va_list rest;                                                                          \
            va_start(rest, flags);                                                                 \
            mode = va_arg(rest, mode_t);                                                           \
            va_end(rest);                                                                          \
        }                                                                                          \
        int failed = flags & O_CREAT ? fails_name(GROWS, #name, AT_FDCWD, path) : 0;               \
        REFUSE(failed, -1);                                                                        \
        return real(path, flags, mode);                                                            \
    }

#define OPEN_AT(name)                                                                              \
    int name(int folder, const char *path, int flags, ...)                                         \
    {                                                                                              \
        REAL(int, #name, int, const char *, int, ...);                                             \
        mode_t mode = 0;                                                                           \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                     \
            va_list rest;                                                                          \
            va_start(rest, flags);                                                                 \
            mode = va_arg(rest, mode_t);                                                           \
            va_end(rest);                                                                          \
        }                                                                                          \
        int failed = flags & O_CREAT ? fails_name(GROWS, #name, folder, path) : 0;                 \
        REFUSE(failed, -1);                                                                        \
        return real(folder, path, flags, mode);                                                    \
    }

OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)

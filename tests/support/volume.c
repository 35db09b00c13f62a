/* Stand-in for a Databricks Volume: a library for LD_PRELOAD that refuses, under one folder, what a Volume refuses.
 *
 * A Volume is a FUSE file system over object storage with direct I/O. Databricks documents that it has no appends and
 * no writes at random positions. The kernel refuses shared mappings of files with direct I/O (ENODEV). There are no
 * hard links, no locks and no sparse files. Each refusal is written to a file, so that a test sees a refusal that a
 * program has swallowed. A rename over an existing file works on a Volume, but is not promised to be atomic.
 *
 * VOLUME_FOLDER: folder that behaves like a Volume, without a slash at the end. VOLUME_REFUSALS: file of the refusals,
 * outside of the folder. The library calls the kernel itself, and so does not depend on the order of symbols.
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
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES 65536

/* A file that is open for writing: its inode, the number of bytes written, and whether the file had bytes before. */
static struct { dev_t device; ino_t inode; off_t written; int old; } files[FILES];

static int inside(const char *path) {
    const char *folder = getenv("VOLUME_FOLDER");
    size_t length = folder ? strlen(folder) : 0;
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static int fd_inside(int fd, char *path) { return fd >= 0 && path_of(fd, path) && inside(path); }

/* Return whether a path that may be relative is inside the folder. */
static int at_inside(int folder, const char *path, char *full) {
    if (path[0] == '/')
        snprintf(full, PATH_MAX, "%s", path);
    else {
        char start[PATH_MAX];
        if (folder == AT_FDCWD ? syscall(SYS_getcwd, start, sizeof start) < 0 : !path_of(folder, start)) return 0;
        if (snprintf(full, PATH_MAX, "%s/%s", start, path) >= PATH_MAX) return 0;
    }
    return inside(full);
}

static int refuse(int error, const char *what, const char *path) {
    const char *log = getenv("VOLUME_REFUSALS");
    if (log) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %s\n", what, path);
        int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
        if (fd >= 0) { syscall(SYS_write, fd, line, length); syscall(SYS_close, fd); }
    }
    errno = error;
    return -1;
}

/* ---------------------------------------------------------------- open */

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    int fd = syscall(SYS_openat, folder, path, flags, mode);
    if (fd < 0 || fd >= FILES) return fd;
    files[fd].inode = 0;
    if ((flags & O_ACCMODE) == O_RDONLY || (flags & O_PATH) || !fd_inside(fd, full)) return fd;
    struct stat state;
    if (fstat(fd, &state) || !S_ISREG(state.st_mode)) return fd;
    if (flags & O_APPEND) { syscall(SYS_close, fd); return refuse(ESPIPE, "append", full); }
    files[fd].device = state.st_dev;
    files[fd].inode = state.st_ino;
    files[fd].written = 0;
    files[fd].old = state.st_size > 0;
    return fd;
}

#define MODE(flags) mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, int); va_end(list); }

int open(const char *path, int flags, ...) { MODE(flags); return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags); return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags); return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags); return opened(folder, path, flags, mode); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

static FILE *open_stream(const char *name, const char *path, const char *mode) {
    char full[PATH_MAX];
    if ((mode[0] == 'a' || strchr(mode, '+')) && at_inside(AT_FDCWD, path, full)) {
        refuse(ESPIPE, "append", full);
        return NULL;
    }
    return ((FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, name))(path, mode);
}

FILE *fopen(const char *path, const char *mode) { return open_stream("fopen", path, mode); }
FILE *fopen64(const char *path, const char *mode) { return open_stream("fopen64", path, mode); }

/* ---------------------------------------------------------------- write */

/* Return 1 if a write at a position is allowed, 0 if the file is outside the folder, and -1 if the write is refused. */
static int sequential(int fd, off_t position) {
    struct stat state;
    char path[PATH_MAX];
    if (fd < 0 || fd >= FILES || !files[fd].inode) return 0;
    if (fstat(fd, &state) || state.st_ino != files[fd].inode || state.st_dev != files[fd].device) return 0;
    if (position < 0) position = syscall(SYS_lseek, fd, 0, SEEK_CUR);
    if (!files[fd].old && position == files[fd].written) return 1;
    path_of(fd, path);
    return refuse(ESPIPE, "write at a random position", path);
}

static ssize_t count(int fd, int allowed, ssize_t written) {
    if (allowed == 1 && written > 0) files[fd].written += written;
    return written;
}

ssize_t write(int fd, const void *data, size_t size) {
    int allowed = sequential(fd, -1);
    return allowed < 0 ? -1 : count(fd, allowed, syscall(SYS_write, fd, data, size));
}
ssize_t writev(int fd, const struct iovec *data, int parts) {
    int allowed = sequential(fd, -1);
    return allowed < 0 ? -1 : count(fd, allowed, syscall(SYS_writev, fd, data, parts));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t position) {
    int allowed = sequential(fd, position);
    return allowed < 0 ? -1 : count(fd, allowed, syscall(SYS_pwrite64, fd, data, size, position));
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t position) { return pwrite(fd, data, size, position); }

static int resize(int fd, off_t size) {
    struct stat state;
    char path[PATH_MAX];
    if (size && fd_inside(fd, path) && !fstat(fd, &state) && state.st_size != size)
        return refuse(EOPNOTSUPP, "resize", path);
    return syscall(SYS_ftruncate, fd, size);
}
int ftruncate(int fd, off_t size) { return resize(fd, size); }
int ftruncate64(int fd, off64_t size) { return resize(fd, size); }
int posix_fallocate(int fd, off_t start, off_t size) {
    char path[PATH_MAX];
    if (fd_inside(fd, path)) { refuse(EOPNOTSUPP, "allocate", path); return EOPNOTSUPP; }
    return syscall(SYS_fallocate, fd, 0, start, size) ? errno : 0;
}
int posix_fallocate64(int fd, off64_t start, off64_t size) { return posix_fallocate(fd, start, size); }

/* ---------------------------------------------------------------- map, link, lock */

void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t start) {
    char path[PATH_MAX];
    if ((flags & MAP_TYPE) != MAP_PRIVATE && !(flags & MAP_ANONYMOUS) && fd_inside(fd, path)) {
        refuse(ENODEV, "shared mapping", path);
        return MAP_FAILED;
    }
    return (void *) syscall(SYS_mmap, address, size, protection, flags, fd, start);
}
void *mmap64(void *address, size_t size, int protection, int flags, int fd, off64_t start) {
    return mmap(address, size, protection, flags, fd, start);
}
int linkat(int from, const char *old, int to, const char *name, int flags) {
    char path[PATH_MAX];
    if (at_inside(to, name, path)) return refuse(ENOSYS, "hard link", path);
    return syscall(SYS_linkat, from, old, to, name, flags);
}
int link(const char *old, const char *name) { return linkat(AT_FDCWD, old, AT_FDCWD, name, 0); }
int symlinkat(const char *target, int folder, const char *name) {
    char path[PATH_MAX];
    if (at_inside(folder, name, path)) return refuse(ENOSYS, "symbolic link", path);
    return syscall(SYS_symlinkat, target, folder, name);
}
int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }
int renameat2(int from, const char *old, int to, const char *name, unsigned flags) {
    char path[PATH_MAX];
    if (flags && at_inside(to, name, path)) return refuse(ENOSYS, "rename with flags", path);
    return syscall(SYS_renameat2, from, old, to, name, flags);
}
int flock(int fd, int operation) {
    char path[PATH_MAX];
    if (fd_inside(fd, path)) { errno = EOPNOTSUPP; return -1; } /* not recorded, because a program may test for locks */
    return syscall(SYS_flock, fd, operation);
}

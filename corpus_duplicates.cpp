// Duplicates: documents that repeat another one, and passages that repeat another one.
//
// Whole documents. The rules gave every document a signature: a hash of its text, and 14 MinHash
// band hashes (Broder 1997; the banding is that of Leskovec, Rajaraman, Ullman, chapter 3). Two
// documents with the same text hash are exact duplicates; two with the same hash in any one band
// are near duplicates. A signature of 1,000 bytes of text takes 128 bytes, but the signatures of a
// large corpus still do not fit into memory, so everything below is streamed from files:
//
//     documents of a task --write_signatures--> a file of signatures, column by column
//     one column of all files --find_pairs, once for each column--> a file of pairs
//     the files of pairs --cluster--> the duplicates, each with the document it repeats
//
// The processes of a run share nothing but a folder. Any process may run any pass, since a pass
// depends on the signatures alone, and so do its bytes.
//
// Passages. A suffix array over the texts of one shard puts equal passages side by side
// (Lee et al. 2021, "Deduplicating Training Data Makes Language Models Better"). Unlike the first
// programs that did so, this one keeps the first copy.
#include <divsufsort64.h>
#include <omp.h>

#include <atomic>
#include <bit>
#include <tuple>

#include "cake/corpus.h"

namespace cake::corpus {
namespace {

// ---------------------------------------------------------------------------------------------
// A file of signatures: a header, and then one column behind the other, little endian:
//     text_hash (documents, 2) uint64, band_hashes (kBands, documents) uint64,
//     has_bands (documents) bits, the lowest bit first

static_assert(std::endian::native == std::endian::little, "files are little endian");

struct SignatureHeader {
  char magic[8];
  uint32_t version, bands;
  uint64_t documents;
};
constexpr char kSignatureMagic[] = "cakesign";
constexpr uint32_t kSignatureVersion = 1;

constexpr size_t kTextHashBytes = sizeof(Signature::text_hash);
constexpr size_t kSignatureBytes = kTextHashBytes + sizeof(Signature::band_hashes);

// The offsets of the columns of pass 0 (text hashes) and 1 to kBands (bands), and of the bits.
uint64_t column_offset(int pass, uint64_t documents) {
  const uint64_t begin = sizeof(SignatureHeader);
  return pass == 0 ? begin
                   : begin + documents * (kTextHashBytes + size_t(pass - 1) * sizeof(uint64_t));
}
uint64_t has_bands_offset(uint64_t documents) { return column_offset(kBands + 1, documents); }

// A file that is read at offsets. Errors name it.
class FileAtOffsets {
 public:
  explicit FileAtOffsets(const std::filesystem::path& path)
      : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) fail(path_.string(), ": cannot open: ", errno_text());
  }
  FileAtOffsets(const FileAtOffsets&) = delete;
  FileAtOffsets& operator=(const FileAtOffsets&) = delete;
  ~FileAtOffsets() { close(fd_); }

  uint64_t size() const {
    struct stat status;
    if (fstat(fd_, &status) != 0) fail(path_.string(), ": cannot read: ", errno_text());
    if (!S_ISREG(status.st_mode)) fail(path_.string(), ": found no regular file");
    return uint64_t(status.st_size);
  }
  void read(uint64_t offset, void* out, size_t bytes) const {
    for (size_t done = 0; done < bytes;) {
      const ssize_t got =
          pread(fd_, static_cast<char*>(out) + done, bytes - done, off_t(offset + done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(path_.string(), ": cannot read: ", errno_text());
      if (got == 0)
        fail(path_.string(), ": found its end at ", offset + done, ": it was shortened");
      done += size_t(got);
    }
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  int fd_;
};

// The number of documents in a file of signatures whose header and size are right.
uint64_t check_signature_file(const FileAtOffsets& file) {
  const std::string path = file.path().string();
  const uint64_t size = file.size();
  SignatureHeader header = {};
  if (size >= sizeof header) file.read(0, &header, sizeof header);
  if (std::memcmp(header.magic, kSignatureMagic, sizeof header.magic) != 0) {
    fail(path, ": found other bytes, expected a file of signatures");
  }
  if (header.version != kSignatureVersion || header.bands != kBands) {
    fail(path, ": found signatures of version ", header.version, " with ", header.bands,
         " bands, expected version ", kSignatureVersion, " with ", kBands);
  }
  const uint64_t n = header.documents;  // a number that lies must not overflow the product below
  const bool possible = n <= size / kSignatureBytes;
  if (!possible || size != has_bands_offset(n) + (n + 7) / 8) {
    fail(path, ": found ", size, " bytes, expected the signatures of ", n,
         " documents: it is truncated or damaged");
  }
  return n;
}

// ---------------------------------------------------------------------------------------------
// A file of pairs: a header, and (document, first document with the same hash) as two uint64 each,
// in order of the hash and then of the document

struct PairHeader {
  char magic[8];
  uint32_t version, pass;
  uint64_t pairs;
};
constexpr char kPairMagic[] = "cakepair";
constexpr uint32_t kPairVersion = 1;

struct DocumentPair {
  uint64_t document, first;
};

class PairWriter {
 public:
  PairWriter(const std::filesystem::path& path, int pass) : file_(path), pass_(uint32_t(pass)) {
    write_header();  // and once more when the number of pairs is known
  }
  void add(uint64_t document, uint64_t first) {
    buffer_.push_back({document, first});
    if (buffer_.size() == kBuffered) flush();
  }
  void commit() {
    flush();
    file_.seek(0);
    write_header();
    file_.commit();
  }

 private:
  static constexpr size_t kBuffered = 1 << 14;
  void write_header() {
    PairHeader header = {{}, kPairVersion, pass_, pairs_};
    std::memcpy(header.magic, kPairMagic, sizeof header.magic);
    file_.write(&header, sizeof header);
  }
  void flush() {
    file_.write(buffer_.data(), buffer_.size() * sizeof(DocumentPair));
    pairs_ += buffer_.size();
    buffer_.clear();
  }
  AtomicFile file_;
  uint32_t pass_;
  uint64_t pairs_ = 0;
  std::vector<DocumentPair> buffer_;
};

PairHeader check_pair_file(const FileAtOffsets& file) {
  const std::string path = file.path().string();
  const uint64_t size = file.size();
  PairHeader header = {};
  if (size >= sizeof header) file.read(0, &header, sizeof header);
  if (std::memcmp(header.magic, kPairMagic, sizeof header.magic) != 0) {
    fail(path, ": found other bytes, expected a file of pairs");
  }
  if (header.version != kPairVersion || header.pass > kBands) {
    fail(path, ": found pairs of version ", header.version, " of pass ", header.pass,
         ", expected version ", kPairVersion, " and a pass up to ", kBands);
  }
  const uint64_t n = header.pairs;
  if (n > size / sizeof(DocumentPair) || size != sizeof header + n * sizeof(DocumentPair)) {
    fail(path, ": found ", size, " bytes, expected ", n, " pairs: it is truncated or damaged");
  }
  return header;
}

// ---------------------------------------------------------------------------------------------
// Pairs of one column. The plain definition: sort (hash, document); in each run of one hash, every
// document but the first makes a pair with the first.
//
// The column does not fit into memory. Its hashes are counted by their first 16 bits, and
// consecutive counts that fit into memory together make a sweep: it reads the column once more and
// takes the records of its range, each straight to its bucket (the counts say where a bucket
// begins), sorts the buckets, and writes their pairs. A bucket that is too large alone, as where a
// text occurs a billion times, is counted by its next 16 bits, and so on; one single hash needs no
// sorting at all. Ranges are swept in order, so the bytes do not depend on the memory.

using WideHash = unsigned __int128;
constexpr int kWideBits = 128, kBucketBits = 16;
constexpr size_t kHashBuckets = size_t(1) << kBucketBits;

struct BandRecord {
  uint64_t hash, document;
  static constexpr int kHashBits = 64;
  BandRecord() = default;
  BandRecord(WideHash wide, uint64_t number) : hash(uint64_t(wide >> 64)), document(number) {}
  bool same_hash(const BandRecord& other) const { return hash == other.hash; }
  bool operator<(const BandRecord& other) const {
    return std::tie(hash, document) < std::tie(other.hash, other.document);
  }
};
struct TextRecord {
  uint64_t high, low, document;
  static constexpr int kHashBits = 128;
  TextRecord() = default;
  TextRecord(WideHash wide, uint64_t number)
      : high(uint64_t(wide >> 64)), low(uint64_t(wide)), document(number) {}
  bool same_hash(const TextRecord& other) const { return high == other.high && low == other.low; }
  bool operator<(const TextRecord& other) const {
    return std::tie(high, low, document) < std::tie(other.high, other.low, other.document);
  }
};

// Runs body(i) for i in [0, n) on several threads. The first failure ends it.
template <class Body>
void parallel_slices(int threads, size_t n, size_t chunk, const Body& body) {
  std::exception_ptr failure;
  std::atomic<bool> failed{false};
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
  for (size_t i = 0; i < n; i++) {
    if (failed) continue;
    try {
      body(i);
    } catch (...) {
#pragma omp critical(corpus_parallel_slices)
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

template <class Record>
class PairFinder {
 public:
  PairFinder(const std::vector<SignatureFile>& files, int pass, const DedupOptions& options,
             PairWriter& out)
      : files_(files),
        pass_(pass),
        threads_(std::max(1, options.threads)),
        capacity_(std::max<size_t>(1, options.memory / sizeof(Record))),
        out_(out) {
    for (const SignatureFile& file : files_) {
      const uint64_t n = check_signature_file(FileAtOffsets(file.path));
      if (file.considered.size() != n) {
        fail(file.path.string(), ": found the signatures of ", n, " documents, expected ",
             file.considered.size());
      }
      for (uint64_t begin = 0; begin < n; begin += kSliceDocuments) {
        slices_.push_back({&file, begin, std::min(n, begin + kSliceDocuments), n});
      }
    }
  }
  void find() { find(0, 0); }

 private:
  static constexpr uint64_t kSliceDocuments = 1 << 15;
  struct Slice {
    const SignatureFile* file;
    uint64_t begin, end, documents;  // of the file's `documents`
  };

  // Calls body(hash, document) for the documents of one slice that take part in this pass.
  template <class Body>
  void read_slice(const Slice& slice, const Body& body) const {
    stop_if_signalled();
    const FileAtOffsets file(slice.file->path);
    const size_t n = size_t(slice.end - slice.begin);
    const size_t width = pass_ == 0 ? 2 : 1;  // of a hash, in words of 64 bits
    std::vector<uint64_t> hashes(n * width);
    file.read(column_offset(pass_, slice.documents) + slice.begin * width * sizeof(uint64_t),
              hashes.data(), hashes.size() * sizeof(uint64_t));
    std::vector<uint8_t> bits(pass_ == 0 ? 0 : (n + 7) / 8);  // a slice begins at a whole byte
    file.read(has_bands_offset(slice.documents) + slice.begin / 8, bits.data(), bits.size());
    for (size_t i = 0; i < n; i++) {
      const bool has_hash = pass_ == 0 || (bits[i / 8] >> (i % 8) & 1);
      if (!has_hash || !slice.file->considered[slice.begin + i]) continue;
      const uint64_t* hash = &hashes[i * width];
      body(WideHash(hash[0]) << 64 | (pass_ == 0 ? hash[1] : 0),
           slice.file->first_document + slice.begin + i);
    }
  }

  // A range of hashes: those whose first `bits` bits are those of `prefix`.
  static bool in_range(WideHash hash, WideHash prefix, int bits) {
    return bits == 0 || (hash ^ prefix) >> (kWideBits - bits) == 0;
  }
  // The next bits of a hash behind the first `bits`.
  static size_t bucket_of(WideHash hash, int bits) {
    return size_t(hash << bits >> (kWideBits - kBucketBits));
  }

  void find(WideHash prefix, int bits) {
    const std::vector<uint64_t> counts = count_buckets(prefix, bits);
    for (size_t begin = 0; begin < kHashBuckets;) {
      size_t end = begin;
      uint64_t records = 0;
      while (end < kHashBuckets && records + counts[end] <= capacity_) records += counts[end++];
      if (end > begin) {
        if (records > 1) sweep(prefix, bits, begin, end, counts);
        begin = end;
      } else {
        const WideHash longer = prefix | WideHash(begin) << (kWideBits - kBucketBits - bits);
        if (bits + kBucketBits < Record::kHashBits) {
          find(longer, bits + kBucketBits);
        } else {
          write_single_hash(longer);
        }
        begin++;
      }
    }
  }

  std::vector<uint64_t> count_buckets(WideHash prefix, int bits) const {
    std::vector<std::vector<uint64_t>> counts;  // one for each thread
    for (int t = 0; t < threads_; t++) counts.emplace_back(kHashBuckets);
    parallel_slices(threads_, slices_.size(), 1, [&](size_t i) {
      std::vector<uint64_t>& own = counts[size_t(omp_get_thread_num())];
      read_slice(slices_[i], [&](WideHash hash, uint64_t) {
        if (in_range(hash, prefix, bits)) own[bucket_of(hash, bits)]++;
      });
    });
    for (size_t t = 1; t < counts.size(); t++) {
      for (size_t b = 0; b < kHashBuckets; b++) counts[0][b] += counts[t][b];
    }
    return std::move(counts[0]);
  }

  // Sorts the records of buckets [begin, end) and writes their pairs.
  void sweep(WideHash prefix, int bits, size_t begin, size_t end,
             const std::vector<uint64_t>& counts) {
    std::vector<uint64_t> bucket_begin(end - begin + 1);
    for (size_t b = begin; b < end; b++) {
      bucket_begin[b - begin + 1] = bucket_begin[b - begin] + counts[b];
    }
    std::vector<uint64_t> cursor(bucket_begin.begin(), bucket_begin.end() - 1);
    const size_t n = size_t(bucket_begin.back());
    std::unique_ptr<Record[]> records(new Record[n]);
    parallel_slices(threads_, slices_.size(), 1, [&](size_t i) {
      read_slice(slices_[i], [&](WideHash hash, uint64_t document) {
        if (!in_range(hash, prefix, bits)) return;
        const size_t b = bucket_of(hash, bits);
        if (b < begin || b >= end) return;
        const std::atomic_ref<uint64_t> place(cursor[b - begin]);
        records[place.fetch_add(1, std::memory_order_relaxed)] = Record(hash, document);
      });
    });
    parallel_slices(threads_, end - begin, 64, [&](size_t b) {
      std::sort(&records[bucket_begin[b]], &records[0] + bucket_begin[b + 1]);
    });
    for (size_t i = 1, first = 0; i < n; i++) {
      if (!records[i].same_hash(records[first])) {
        first = i;
      } else {
        out_.add(records[i].document, records[first].document);
      }
    }
  }

  // The documents of one hash, which are more than memory holds, in the order of their numbers.
  void write_single_hash(WideHash hash) {
    std::optional<uint64_t> first;
    std::vector<Slice> ordered = slices_;
    std::stable_sort(ordered.begin(), ordered.end(), [](const Slice& a, const Slice& b) {
      return a.file->first_document + a.begin < b.file->first_document + b.begin;
    });
    for (const Slice& slice : ordered) {
      read_slice(slice, [&](WideHash other, uint64_t document) {
        if (other != hash) return;
        if (first) out_.add(document, *first);
        if (!first) first = document;
      });
    }
  }

  const std::vector<SignatureFile>& files_;
  int pass_, threads_;
  uint64_t capacity_;  // records in memory
  PairWriter& out_;
  std::vector<Slice> slices_;
};

}  // namespace

void write_signatures(const std::filesystem::path& path, std::span<const Signature> list) {
  constexpr size_t kSlice = 1 << 16;  // documents whose column is held at once
  SignatureHeader header = {{}, kSignatureVersion, kBands, list.size()};
  std::memcpy(header.magic, kSignatureMagic, sizeof header.magic);
  AtomicFile file(path);
  file.write(&header, sizeof header);
  std::vector<uint64_t> slice;
  const auto write_slices = [&](const auto& append) {
    for (size_t begin = 0; begin < list.size(); begin += kSlice) {
      slice.clear();
      for (const Signature& s : list.subspan(begin, std::min(kSlice, list.size() - begin)))
        append(s);
      file.write(slice.data(), slice.size() * sizeof(uint64_t));
    }
  };
  write_slices([&](const Signature& s) {
    for (const uint64_t half : s.text_hash) slice.push_back(half);
  });
  for (size_t band = 0; band < kBands; band++) {
    write_slices([&](const Signature& s) { slice.push_back(s.band_hashes[band]); });
  }
  std::vector<uint8_t> bits((list.size() + 7) / 8);
  for (size_t i = 0; i < list.size(); i++) {
    bits[i / 8] = uint8_t(bits[i / 8] | unsigned(list[i].has_bands) << (i % 8));
  }
  file.write(bits.data(), bits.size());
  file.commit();
}

void find_pairs(const std::vector<SignatureFile>& files, int pass, const DedupOptions& options,
                const std::filesystem::path& out) {
  require(pass >= 0 && pass <= kBands, "find_pairs: found pass ", pass, ", expected 0 to ", kBands);
  PairWriter writer(out, pass);
  if (pass == 0 && options.exact) PairFinder<TextRecord>(files, pass, options, writer).find();
  if (pass > 0 && options.near) PairFinder<BandRecord>(files, pass, options, writer).find();
  writer.commit();
}

// ---------------------------------------------------------------------------------------------
// Clusters. Exact duplicates are taken out first. Each has the bands of its original, so its near
// pairs are pairs of its original too, and the original takes its place in them. What is left is
// clustered by union-find (Galler, Fischer 1964; path halving by Tarjan, van Leeuwen 1984). The
// root of a cluster is its smallest number, in whatever order the pairs come.

namespace {

// An array of zeros: in memory, or where it is larger than the bound in a temporary file without a
// name, whose pages the system writes out when memory is short.
class MappedNumbers {
 public:
  MappedNumbers(uint64_t n, size_t memory, const std::filesystem::path& folder)
      : bytes_(size_t(std::max<uint64_t>(1, n)) * sizeof(uint64_t)) {
    const bool in_memory = bytes_ <= memory;
    const int fd = in_memory ? -1 : temporary_file(folder);
    void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        in_memory ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    if (fd >= 0) close(fd);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    numbers_ = static_cast<uint64_t*>(mapped);
  }
  MappedNumbers(const MappedNumbers&) = delete;
  MappedNumbers& operator=(const MappedNumbers&) = delete;
  ~MappedNumbers() { munmap(numbers_, bytes_); }
  uint64_t& operator[](uint64_t i) { return numbers_[i]; }

 private:
  int temporary_file(const std::filesystem::path& folder) const {
    std::string name = (folder / "clusters-XXXXXX").string();
    const int fd = mkstemp(name.data());
    if (fd < 0) fail(folder.string(), ": cannot create a temporary file: ", errno_text());
    unlink(name.c_str());
    // Space is taken now: on a full disk a write to a mapped page would end the process.
    const int error = posix_fallocate(fd, 0, off_t(bytes_));
    if (error != 0) {
      close(fd);
      fail(folder.string(), ": cannot take ", bytes_text(double(bytes_)),
           " for a temporary file: ", std::strerror(error));
    }
    return fd;
  }
  size_t bytes_;
  uint64_t* numbers_ = nullptr;
};

class DocumentClusters {
 public:
  DocumentClusters(uint64_t documents, const DedupOptions& options)
      : documents_(documents), parent_(documents, options.memory, options.folder) {
    for (uint64_t i = 0; i < documents; i++) parent_[i] = i;
  }
  // Exact duplicates come before all near ones.
  void add_exact(uint64_t document, uint64_t first) { parent_[document] = first | kExactFlag; }
  void add_near(uint64_t a, uint64_t b) {
    a = root(without_exact(a)), b = root(without_exact(b));
    if (a != b) parent_[std::max(a, b)] = std::min(a, b);
  }
  std::vector<Duplicate> duplicates() {
    std::vector<Duplicate> list;
    for (uint64_t i = 0; i < documents_; i++) {
      const bool exact = parent_[i] & kExactFlag;
      const uint64_t original = exact ? without_exact(i) : root(i);
      if (original != i) list.push_back({i, original, exact});
    }
    return list;
  }

 private:
  static constexpr uint64_t kExactFlag = uint64_t(1) << 63;
  uint64_t without_exact(uint64_t i) {
    return parent_[i] & kExactFlag ? parent_[i] & ~kExactFlag : i;
  }
  uint64_t root(uint64_t i) {
    while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
    return i;
  }
  uint64_t documents_;
  MappedNumbers parent_;  // of an exact duplicate: its original, flagged
};

template <class Body>
void read_pairs(const FileAtOffsets& file, uint64_t pairs, uint64_t documents, const Body& body) {
  std::vector<DocumentPair> block;
  for (uint64_t done = 0; done < pairs; done += block.size()) {
    stop_if_signalled();
    block.resize(size_t(std::min<uint64_t>(pairs - done, 1 << 16)));
    file.read(sizeof(PairHeader) + done * sizeof(DocumentPair), block.data(),
              block.size() * sizeof(DocumentPair));
    for (const DocumentPair& pair : block) {
      if (pair.first >= pair.document || pair.document >= documents) {
        fail(file.path().string(), ": found the pair ", pair.document, ", ", pair.first,
             ", expected numbers of ", documents, " documents, the larger one first");
      }
      body(pair);
    }
  }
}

}  // namespace

std::vector<Duplicate> cluster(const std::vector<std::filesystem::path>& paths, uint64_t documents,
                               const DedupOptions& options) {
  std::map<uint32_t, const std::filesystem::path*> path_of_pass;
  for (const auto& path : paths) {
    const uint32_t pass = check_pair_file(FileAtOffsets(path)).pass;
    const auto [found, is_new] = path_of_pass.emplace(pass, &path);
    if (!is_new) {
      fail(path.string(), ": found pass ", pass, ", which ", found->second->string(), " is too");
    }
  }
  for (uint32_t pass = 0; pass <= kBands; pass++) {
    const bool needed = pass == 0 ? options.exact : options.near;
    require(!needed || path_of_pass.count(pass), "the pairs of pass ", pass, " are missing");
  }
  DocumentClusters clusters(documents, options);
  for (const auto& [pass, path] : path_of_pass) {  // pass 0, the exact duplicates, first
    const FileAtOffsets file(*path);
    const bool exact = pass == 0;
    read_pairs(file, check_pair_file(file).pairs, documents, [&](const DocumentPair& pair) {
      exact ? clusters.add_exact(pair.document, pair.first)
            : clusters.add_near(pair.document, pair.first);
    });
  }
  return clusters.duplicates();
}

// ---------------------------------------------------------------------------------------------
// Repeated passages. The definition: the window of min_bytes bytes at i is repeated if the same
// bytes stand wholly before it, at some j with j + min_bytes <= i, each inside one text. The bytes
// of all repeated windows are removed. A repeated passage of more than min_bytes is the union of
// its windows, so longer ones need no rule of their own. Since j's window may not reach into i's,
// "ab" a thousand times keeps its first min_bytes bytes, and every byte that is removed still
// stands somewhere before.
//
// The suffix array puts equal windows side by side; the first of a group is its smallest number.
// Memory: 8 bytes of suffix array, 1 of joined texts and 1/4 of marks for each byte of text, beside
// the texts. A comparison of two neighbours reads at most min_bytes bytes. 7 to 11 MB of text a
// second, nearly all of it divsufsort's.

namespace {

// Marks the starts of repeated windows. fits: the window that begins there ends inside its text.
std::vector<bool> find_repeated_windows(const std::string& joined, const std::vector<bool>& fits,
                                        size_t min_bytes) {
  const size_t n = joined.size();
  const std::unique_ptr<int64_t[]> suffixes(new int64_t[n]);
  const auto* bytes = reinterpret_cast<const unsigned char*>(joined.data());
  if (divsufsort64(bytes, suffixes.get(), int64_t(n)) != 0) throw std::bad_alloc();
  const auto same_window = [&](size_t a, size_t b) {
    return std::max(a, b) + min_bytes <= n && std::memcmp(bytes + a, bytes + b, min_bytes) == 0;
  };
  std::vector<bool> repeated(n);
  for (size_t begin = 0, end; begin < n; begin = end) {
    size_t first = fits[size_t(suffixes[begin])] ? size_t(suffixes[begin]) : n;
    for (end = begin + 1; end < n; end++) {
      if (end + 16 < n) __builtin_prefetch(bytes + suffixes[end + 16]);
      const auto at = size_t(suffixes[end]);
      if (!same_window(size_t(suffixes[end - 1]), at)) break;
      if (fits[at]) first = std::min(first, at);
    }
    if (end == begin + 1) continue;
    for (size_t r = begin; r < end; r++) {
      const auto at = size_t(suffixes[r]);
      if (fits[at] && at >= first + min_bytes) repeated[at] = true;
    }
  }
  return repeated;
}

bool is_utf8_continuation(char c) { return (c & 0xc0) == 0x80; }

// The text without the bytes of its repeated windows; those of `repeated` begin at `offset`. A cut
// inside a character moves inward, so that whole characters stay.
std::string without_windows(const std::string& text, const std::vector<bool>& repeated,
                            size_t offset, size_t min_bytes) {
  std::string kept;
  size_t kept_until = 0;  // bytes before are in `kept` or removed
  for (size_t i = 0; i < text.size();) {
    if (!repeated[offset + i]) {
      i++;
      continue;
    }
    size_t begin = i, end = i + min_bytes;
    for (i++; i < text.size() && i <= end; i++) {
      if (repeated[offset + i]) end = i + min_bytes;
    }
    while (begin < end && is_utf8_continuation(text[begin])) begin++;
    while (end > begin && end < text.size() && is_utf8_continuation(text[end])) end--;
    kept.append(text, kept_until, begin - kept_until);
    kept_until = end;
  }
  return kept.append(text, kept_until);
}

}  // namespace

std::vector<int64_t> remove_repeated_substrings(std::vector<std::string>& texts, size_t min_bytes) {
  require(min_bytes > 0, "repeated substrings: found a length of 0 bytes, expected 1 or more");
  size_t total = 0;
  for (const std::string& text : texts) total += text.size();
  std::string joined;
  joined.reserve(total);
  std::vector<bool> fits(total);
  for (const std::string& text : texts) {
    for (size_t i = 0; i + min_bytes <= text.size(); i++) fits[joined.size() + i] = true;
    joined += text;
  }
  const std::vector<bool> repeated = find_repeated_windows(joined, fits, min_bytes);
  std::vector<int64_t> removed;
  size_t offset = 0;
  for (std::string& text : texts) {
    const size_t before = text.size();
    text = without_windows(text, repeated, offset, min_bytes);
    removed.push_back(int64_t(before - text.size()));
    offset += before;
  }
  return removed;
}

}  // namespace cake::corpus

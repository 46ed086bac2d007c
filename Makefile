# cake: one binary a stage. `make help` lists what there is to make.
#
#   CXX=clang++      another compiler (g++ 12 or clang 14 and newer)
#   MARCH=x86-64-v3  another machine than this one
#   WERROR=1         warnings are errors
#   CXXFLAGS=-g      further flags, which come last: CXXFLAGS=-O0 holds everywhere
#   BUILD=dir        where objects go; BIN=dir: where the stages' binaries go
#   CUDA=0|1         the CUDA engine: left out, built in (default: where nvcc and a GPU are)
#   CUDA_ARCHS="80 90a"   for these GPUs (default: the one that is here)
#   -jN              so many compilers at once, not one a processor

BUILD ?= build
BIN ?= .
MARCH ?= native
CLANG_FORMAT ?= $(firstword $(shell command -v clang-format-14 clang-format) clang-format-14)

# GCC 12 warns about every "..." + std::string (its bug 105651).
GCC_ONLY := $(if $(findstring clang,$(CXX)),,-Wno-restrict)
FLAGS := -std=c++20 -O3 -march=$(MARCH) -ffp-contract=fast -fopenmp -I. \
         -Wall -Wextra -Wno-missing-field-initializers $(GCC_ONLY) $(if $(WERROR),-Werror)
LIBRARIES := -Wl,--as-needed -lgumbo -lcld2 -lpsl -luchardet -ldivsufsort64 -lsnappy \
             -lsimdjson -lzstd -lz -ledit -lcpp-httplib -lsqlite3
# cpp-httplib is built in parts that its users must have too: its header says the same as the library.
HTTP_FLAGS := $(shell pkg-config --cflags cpp-httplib 2>/dev/null)
HEADERS := CLI/CLI.hpp cld2/public/compact_lang_det.h divsufsort64.h doctest/doctest.h gumbo.h histedit.h httplib.h libpsl.h \
           nlohmann/json.hpp omp.h simdjson.h snappy.h sqlite3.h uchardet/uchardet.h xxhash.h zlib.h zstd.h

# The longest to compile first.
MODEL_STAGES := rlhf reward chat sft serve
STAGES := train_gpt $(MODEL_STAGES) corpus bpe
BPE = $(patsubst %.cpp,$(OBJECTS)/%.o,$(wildcard bpe*.cpp))
CHAT = $(OBJECTS)/chat_template.o $(OBJECTS)/jinja.o
SERVE = $(patsubst %.cpp,$(OBJECTS)/%.o,$(wildcard serve*.cpp))
CORPUS = $(patsubst %.cpp,$(OBJECTS)/%.o,$(wildcard corpus*.cpp))
TOOLS := world report overoptimize
SOURCES = $(wildcard *.cpp *.cu cake/*.h dev/*.cpp dev/*.h dev/*/*.cpp dev/*/*.h test/*.cpp test/*.h \
            test/*/*.cpp test/*/*.h test/*/*/*.h)

# Some stages are libraries too: their main is weak, and gives way to that of a program which links
# them. test/test_gpt.cpp and dev/bench/bench.cpp include train_gpt.cpp itself: they look at what is
# inside.
OBJECTS := $(BUILD)/objects
ENGINE := $(OBJECTS)/train_gpt.o
# The CUDA engine: by nvcc, or as C++ over test/cuda_on_cpu/, which runs its kernels on the CPU (the
# tests, and `make emulate`).
NVCC ?= $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
CUDA ?= $(if $(and $(NVCC),$(shell nvidia-smi -L 2>/dev/null)),1,0)
CUDA_ARCHS ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u)
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
NVCC_FLAGS = -std=c++20 -O3 -I. -lineinfo $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
  $(addprefix -gencode arch=compute_,$(foreach a,$(lastword $(CUDA_ARCHS)),$(a),code=compute_$(a))) \
  -Xcompiler=-march=$(MARCH),-fopenmp,-Wall,-Wextra,-Wno-missing-field-initializers,-Wno-unused-function \
  --diag-suppress=177
ON_CPU := $(OBJECTS)/test/cuda_on_cpu/runtime.o
ON_CPU_FLAGS := -DCAKE_CUDA_ON_CPU -Itest/cuda_on_cpu/include -fno-strict-aliasing -Wno-unknown-pragmas -pthread
EMULATE := $(BUILD)/emulate
EMULATED_ENGINE := $(OBJECTS)/emulate/train_gpt.o $(OBJECTS)/emulate/train_gpt.cuda.o $(ON_CPU)
ifeq ($(CUDA),1)
ENGINE += $(OBJECTS)/train_gpt.cuda.o
ENGINE_FLAGS := -DCAKE_CUDA
LIBRARIES += -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcublasLt -lcudart
endif
FAULT_OBJECTS := $(OBJECTS)/test/main.o $(ON_CPU) $(OBJECTS)/train_gpt.o $(BPE)
TESTS := $(patsubst %.cpp,$(OBJECTS)/%.o,$(wildcard test/*.cpp))

ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
endif
ifneq ($(filter clean,$(MAKECMDGOALS)),)
# `make clean all`, `make clean test`: every object and every other goal waits for it.
$(BUILD)/command $(filter-out clean,$(MAKECMDGOALS)): clean
endif

all: $(STAGES:%=$(BIN)/%) $(TOOLS:%=$(BUILD)/%) ## all binaries (the default)

run: ## set up, build and bake the whole cake: RUN=dir TEXT=path MINUTES=n
	@dev/setup.sh
	@$(MAKE) --no-print-directory all
	@dev/demo.sh
export RUN TEXT MINUTES FROM

reviews: all ## a policy that goes on with film reviews favourably: TEXT=file RUN=dir
	@dev/reviews.sh

overoptimize: all ## reward hacking: gold against proxy, three reward models: RUN=dir FROM=runs/demo
	@dev/overoptimize.sh

base-to-chat: all ## RL alone: grpo from the base model beside grpo from the assistant: RUN=dir FROM=runs/demo
	@dev/base_to_chat.sh

# FROM: the folder of make run, as for overoptimize.
arena: $(BIN)/serve ## vote in the browser on the demo's assistants: RUN=dir FROM=runs/demo PORT=n
	@dev/arena.sh

arena-test: $(BIN)/serve $(BIN)/reward $(BIN)/chat $(BUILD)/arena_voter ## a program votes, a reward model and a policy learn from it: RUN=dir FROM=runs/demo VOTES=n ANSWERS=n
	@dev/arena_test.sh
export PORT VOTES ANSWERS

test: ## set up, build and run every test; DEVICE=cuda: the CUDA engine's on the GPU
	@dev/setup.sh
ifeq ($(DEVICE),cuda)
	@$(MAKE) --no-print-directory CUDA=1 $(BUILD)/test_gpu
	@$(BUILD)/test_gpu
else
	@$(MAKE) --no-print-directory all $(BUILD)/test
	@$(BUILD)/test
endif

# In a folder of its own, which holds its binaries and, under build/, its objects: the tests run there.
variant = $(MAKE) --no-print-directory BIN=build/$(1) BUILD=build/$(1)/build $(2) all build/$(1)/build/test && \
  ln -sfn ../../dev ../../test build/$(1)/ && cd build/$(1) && \
  CAKE_DATA="$${CAKE_DATA:-$(CURDIR)/../shared/data}" build/test
SANITIZE := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

test-all: ## sanitized, for x86-64-v3, by clang, test-threads, test-faults, sm_80: takes over an hour, and dev/setup.sh --all
	@dev/setup.sh --all
	@$(MAKE) --no-print-directory test-sanitized
	@CAKE_TEST_ALL=1 $(MAKE) --no-print-directory test-v3
	@$(MAKE) --no-print-directory test-threads
	@$(MAKE) --no-print-directory test-faults
	@$(MAKE) --no-print-directory CXX=clang++ BUILD=build/clang BIN=build/clang all build/clang/test build/clang/bench
	@$(if $(NVCC),$(MAKE) --no-print-directory spills CUDA_ARCHS="80 90a",echo "skipped: spills: nvcc is not installed")

test-sanitized: ## every test under AddressSanitizer and UBSan, in build/sanitized
	+@$(call variant,sanitized,CXXFLAGS="$(SANITIZE)")

test-v3: ## every test compiled for MARCH=x86-64-v3, in build/v3
	+@$(call variant,v3,MARCH=x86-64-v3)

# GCC's OpenMP library is not instrumented, so the engine has one thread. The stages are not built.
MINUTES_OF_LOAD ?= 1
test-threads: ## the server under a mixed load and ThreadSanitizer, in build/threads: MINUTES_OF_LOAD=n
	+@$(MAKE) --no-print-directory BUILD=$(BUILD)/threads CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=thread" $(BUILD)/threads/test_threads
	@OMP_NUM_THREADS=1 TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1 suppressions=test/tsan_suppressions.txt" CAKE_SERVE_MINUTES=$(MINUTES_OF_LOAD) $(BUILD)/threads/test_threads

emulate: $(STAGES:%=$(EMULATE)/%) ## the stages with --device cuda running on the CPU, in build/emulate

test-faults: $(FAULT_OBJECTS) ## deliberate faults in the CUDA engine, each of which must turn a test red
	@CXX="$(CXX)" FLAGS="$(FLAGS) $(ON_CPU_FLAGS) $(CXXFLAGS)" OBJECTS="$(FAULT_OBJECTS)" LIBRARIES="$(LIBRARIES)" dev/faults.sh

spills: ## compile the CUDA engine for CUDA_ARCHS and fail on a spilled register
	@dev/spills.sh "$(NVCC)" $(NVCC_FLAGS)

bench: $(BUILD)/bench ## measure this machine and cake on it: PEER=python with PyTorch
	@$(BUILD)/bench $(if $(PEER),--peer $(PEER))

# Peers of the corpus: datatrove and trafilatura in PEER's Python; WEB: pages with their main text.
WEB ?= ../shared/data/web/wcxb_dev.jsonl.zst
TEXTS ?= ../shared/data
bench-corpus: $(BIN)/corpus $(BUILD)/bench_rules $(BUILD)/bench_duplicates $(BUILD)/extraction_blocks ## ./corpus beside datatrove and trafilatura: PEER=python WEB=file TEXTS=dir
	@$(if $(PEER),,echo "error: PEER is missing: a python with datatrove, trafilatura and lightgbm" >&2; exit 1)
	TOOL=$(BUILD)/extraction_blocks $(PEER) dev/bench/extraction.py $(WEB)
	$(PEER) dev/bench/datatrove_rules.py --data $(TEXTS) --folder $(BUILD)/datatrove_rules --binary $(BUILD)/bench_rules
	$(PEER) dev/bench/datatrove_minhash.py $(TEXTS)/reviews/movie_reviews.jsonl --corpus $(BIN)/corpus
	$(BUILD)/bench_duplicates 5000000

bench-bpe: $(BIN)/bpe $(BUILD)/bench_tokenizer ## ./bpe beside gigatoken, tiktoken and tokenizers: PEER=python TEXT=file MORE="c=file zh=file"
	@$(if $(and $(PEER),$(TEXT)),,echo "error: PEER or TEXT is missing: a python with gigatoken, tiktoken and tokenizers; a large text" >&2; exit 1)
	$(PEER) dev/bench/tokenizer.py "$(TEXT)" --texts $(MORE) --data $(TEXTS)/tokenizers --bpe $(BIN)/bpe --bench $(BUILD)/bench_tokenizer --work $(BUILD)/tokenizers --json $(BUILD)/bench_tokenizer.json

# DEMO: the folder of make run. With PEER, a Python with xllamacpp, and SMOLLM2, a .gguf file:
# llama.cpp's server too.
DEMO ?= runs/demo
bench-serve: $(BIN)/serve $(BIN)/chat $(BIN)/bpe $(BIN)/train_gpt $(BUILD)/serve_load ## ./serve under load, beside ./chat generate and llama.cpp's server: DEMO=runs/demo PEER=python SMOLLM2=file
	@python3 dev/bench/serve.py --demo "$(DEMO)" --texts "$(TEXTS)" $(if $(PEER),--peer "$(PEER)") $(if $(SMOLLM2),--smollm2 "$(SMOLLM2)") $(if $(ONLY),--only "$(ONLY)")

# Ten minutes for each: FUZZ_SECONDS=n, FUZZ="warc html". CAKE_TEMPLATES: a folder with published chat
# templates, to begin with.
FUZZ ?= warc jsonl records parquet html regex encode tokenizer gguf safetensors config verify serve_http serve_api chat_template
FUZZ_SECONDS ?= 600
fuzz: ## any bytes as WARC, JSON lines, records, parquet, HTML, split patterns, text to encode, tokenizer files, GGUF and safetensors files, configs, answers to judge, bytes sent to ./serve, and chat templates, under the sanitizers, with clang's libFuzzer
	+@$(MAKE) --no-print-directory CXX=clang++ BUILD=$(BUILD)/fuzz CXXFLAGS="-O1 -g1 -fsanitize=fuzzer-no-link,address,undefined" $(FUZZ:%=$(BUILD)/fuzz/fuzz_%)
	@for target in $(FUZZ); do mkdir -p $(BUILD)/fuzz/corpus_$$target && \
	  $(BUILD)/fuzz/fuzz_$$target -max_total_time=$(FUZZ_SECONDS) -timeout=20 -max_len=65536 -rss_limit_mb=2000 -malloc_limit_mb=4096 $(BUILD)/fuzz/corpus_$$target \
	  $$(find test/fuzz/seeds/$$target test/golden/$$target test/golden/$${target}_rows $$(test $$target != chat_template || echo $(CAKE_TEMPLATES)) -maxdepth 0 2>/dev/null) || exit 1; done

syntax: $(patsubst %.cpp,$(OBJECTS)/%.syntax,$(wildcard *.cpp)) ## let CXX look for warnings in the stages, without compiling them
$(OBJECTS)/%.syntax: %.cpp $(BUILD)/command | $(BUILD)/packages
	@$(CXX) $(FLAGS) $(HTTP_FLAGS) $(CXXFLAGS) -fsyntax-only $<

format: ## format all sources
	@$(CLANG_FORMAT) -i $(SOURCES)

format-check: ## say which sources are not formatted
	@$(CLANG_FORMAT) --dry-run --Werror $(SOURCES)

clean: ## remove everything that was built
	rm -rf $(BUILD) $(STAGES:%=$(BIN)/%)

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -------------------------------------------------------------------------------------------------
# Binaries

# A program's own object stands first: of two weak mains the linker takes the first.
$(BIN)/bpe $(EMULATE)/bpe: $(BPE)
$(BIN)/corpus $(EMULATE)/corpus: $(CORPUS)
$(BIN)/train_gpt: $(ENGINE) $(BPE)
$(EMULATE)/train_gpt: $(EMULATED_ENGINE) $(BPE)
$(MODEL_STAGES:%=$(BIN)/%): $(BIN)/%: $(OBJECTS)/%.o $(ENGINE) $(CHAT) $(BPE)
$(MODEL_STAGES:%=$(EMULATE)/%): $(EMULATE)/%: $(OBJECTS)/%.o $(EMULATED_ENGINE) $(CHAT) $(BPE)
$(BIN)/serve $(EMULATE)/serve: $(SERVE)
$(TOOLS:%=$(BUILD)/%): $(BUILD)/%: $(OBJECTS)/dev/%.o
$(BUILD)/bench_rules: $(OBJECTS)/dev/bench/corpus_rules.o $(CORPUS)
$(BUILD)/bench_duplicates: $(OBJECTS)/dev/bench/corpus_duplicates.o $(CORPUS)
$(BUILD)/extraction_blocks: $(OBJECTS)/dev/extraction_blocks.o $(CORPUS)
$(BUILD)/split_pieces: $(OBJECTS)/dev/split_pieces.o $(BPE)
$(BUILD)/logits: $(OBJECTS)/dev/logits.o $(ENGINE) $(BPE)
$(BUILD)/jinja_render: $(OBJECTS)/dev/jinja_render.o $(OBJECTS)/jinja.o
$(BUILD)/fuzz_%: $(OBJECTS)/test/fuzz/fuzz_%.o $(CORPUS) $(CHAT) $(BPE)
	@echo "link $@"
	@$(CXX) $(FLAGS) $(CXXFLAGS) -fsanitize=fuzzer,address,undefined $^ $(LIBRARIES) -o $@
$(BUILD)/fuzz_serve_http: $(OBJECTS)/serve_http.o $(OBJECTS)/serve_http_request.o
$(BUILD)/fuzz_serve_api: $(OBJECTS)/serve_api.o
$(BUILD)/bench: $(OBJECTS)/dev/bench/bench.o $(BPE)
$(BUILD)/bench_decode: $(OBJECTS)/dev/bench/decode.o $(ENGINE) $(BPE)
$(BUILD)/bench_tokenizer: $(OBJECTS)/dev/bench/tokenizer.o $(BPE)
$(BUILD)/serve_load: $(OBJECTS)/dev/bench/serve_load.o
$(BUILD)/arena_voter: $(OBJECTS)/dev/arena_voter.o
$(BUILD)/test_gpu: $(OBJECTS)/test/test_cuda.cuda.o $(OBJECTS)/test/main.o \
                   $(OBJECTS)/train_gpt.o $(BPE)
$(BUILD)/test_threads: $(OBJECTS)/test/test_serve_threads.o $(OBJECTS)/test/main.o $(SERVE) $(ENGINE) $(CHAT) $(BPE)
$(BUILD)/test: $(TESTS) $(CORPUS) $(SERVE) $(CHAT) $(BPE) $(OBJECTS)/dev/world.o $(ON_CPU)

$(STAGES:%=$(BIN)/%) $(STAGES:%=$(EMULATE)/%) $(TOOLS:%=$(BUILD)/%) $(BUILD)/bench $(BUILD)/bench_decode $(BUILD)/bench_tokenizer $(BUILD)/bench_rules $(BUILD)/bench_duplicates $(BUILD)/serve_load $(BUILD)/arena_voter $(BUILD)/extraction_blocks $(BUILD)/split_pieces $(BUILD)/logits $(BUILD)/jinja_render $(BUILD)/test $(BUILD)/test_gpu $(BUILD)/test_threads:
	@mkdir -p $(@D)
	@echo "link $@"
	@$(CXX) $(FLAGS) $(CXXFLAGS) $(filter %.o,$^) $(LIBRARIES) -pthread -o $@

# -------------------------------------------------------------------------------------------------
# Objects. Each depends on the headers it included last time, on the command that made it, and on
# the packages' being there.

$(OBJECTS)/%.o: %.cpp $(BUILD)/command | $(BUILD)/packages
	@mkdir -p $(@D)
	@echo "compile $<"
	@$(CXX) $(FLAGS) $(CXXFLAGS) -MMD -MP -c $< -o $@

# Code that waits for an engine, a tokenizer or a file need not be the fastest: it compiles in two
# thirds of the time. GCC fuses products and sums at -O1 only with a flag; without it the stages'
# weights could round in another way.
$(MODEL_STAGES:%=$(OBJECTS)/%.o) $(SERVE) $(CHAT) $(OBJECTS)/corpus.o $(OBJECTS)/corpus_report.o $(TOOLS:%=$(OBJECTS)/dev/%.o) $(OBJECTS)/dev/logits.o: private FLAGS += \
  -O1 $(if $(GCC_ONLY),-fexpensive-optimizations)
$(TESTS): private FLAGS += -O1
$(OBJECTS)/test/test_gpt.o: private FLAGS += -O3  # the engine itself is in it
$(OBJECTS)/test/test_cuda.o: private FLAGS += -O2

$(OBJECTS)/emulate/train_gpt.o: train_gpt.cpp $(BUILD)/command | $(BUILD)/packages
	@mkdir -p $(@D)
	@echo "compile $< with a CUDA engine"
	@$(CXX) $(FLAGS) $(CXXFLAGS) -DCAKE_CUDA -DCAKE_CUDA_ON_CPU -MMD -MP -c $< -o $@

$(OBJECTS)/emulate/train_gpt.cuda.o: train_gpt.cu $(BUILD)/command | $(BUILD)/packages
	@mkdir -p $(@D)
	@echo "compile $< for the CPU"
	@$(CXX) $(FLAGS) $(CXXFLAGS) -MMD -MP -x c++ -c $< -o $@

$(OBJECTS)/train_gpt.cuda.o: train_gpt.cu $(BUILD)/command | $(BUILD)/packages
	@mkdir -p $(@D)
	@echo "compile $< for $(CUDA_ARCHS)"
	@$(if $(NVCC),,echo "error: nvcc is missing: install the CUDA toolkit, or set NVCC" >&2; exit 1)
	@$(if $(CUDA_ARCHS),,echo "error: no GPU is here to build for: set CUDA_ARCHS, as in CUDA_ARCHS='80 90a'" >&2; exit 1)
	@$(NVCC) $(NVCC_FLAGS) -MMD -MP -c $< -o $@

$(OBJECTS)/test/test_cuda.cuda.o: test/test_cuda.cpp $(BUILD)/command
	@mkdir -p $(@D)
	@echo "compile $< for $(CUDA_ARCHS)"
	@$(NVCC) $(NVCC_FLAGS) -x cu -MMD -MP -c $< -o $@

# The files that the assembler includes: the compiler's list of headers does not name them.
$(OBJECTS)/bpe_page.o: web/style.css web/tokens.js web/stats.html web/stats.js
$(OBJECTS)/serve_page.o: $(wildcard web/*)

$(OBJECTS)/train_gpt.o: private FLAGS += $(ENGINE_FLAGS)
$(SERVE) $(patsubst %.cpp,$(OBJECTS)/%.o,$(wildcard test/test_serve*.cpp test/test_page.cpp test/fuzz/fuzz_serve*.cpp dev/bench/serve*.cpp)) $(OBJECTS)/dev/arena_voter.o: private FLAGS += $(HTTP_FLAGS)
$(ON_CPU) $(OBJECTS)/emulate/train_gpt.cuda.o $(patsubst %.cpp,$(OBJECTS)/%.o,$(wildcard test/test_cuda*.cpp)): private FLAGS += $(ON_CPU_FLAGS)

-include $(shell find $(OBJECTS) -name '*.d' 2>/dev/null)

COMMAND = $(CXX) $(FLAGS) $(CXXFLAGS) $(HTTP_FLAGS) $(LIBRARIES) $(ENGINE_FLAGS) $(if $(filter 1,$(CUDA)),$(NVCC_FLAGS))
$(BUILD)/command: FORCE
	@mkdir -p $(@D)
	@echo '$(COMMAND)' | cmp -s - $@ || echo '$(COMMAND)' > $@

$(BUILD)/packages: $(BUILD)/command
	@pkg-config --exists cpp-httplib || \
	  { echo "error: pkg-config does not find cpp-httplib: run dev/setup.sh" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || \
	  { echo "error: $(firstword $(CXX)) is missing: run dev/setup.sh" >&2; exit 1; }
	@for header in $(HEADERS); do \
	  printf '#if !__has_include(<%s>)\n#error\n#endif\n' $$header | \
	    $(CXX) $(FLAGS) $(CXXFLAGS) -E -x c++ - >/dev/null 2>&1 || \
	    { echo "error: <$$header> is missing: run dev/setup.sh" >&2; exit 1; }; \
	done
	@touch $@

.PHONY: all run reviews overoptimize base-to-chat arena arena-test test test-all test-sanitized test-v3 test-threads emulate test-faults spills syntax bench bench-bpe bench-corpus bench-serve fuzz format format-check clean help FORCE
.DELETE_ON_ERROR:
.SUFFIXES:

// Aligned memory that grows to the size of the largest step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

template <class T> class Buffer {
  public:
    T* take(size_t count) {
        if (count * sizeof(T) > size_) {
            size_ = count * sizeof(T);
            memory_.reset(new char[size_ + 64]);
        }
        return at_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t(63));
    }

    T* get() const { return at_; }

  private:
    std::unique_ptr<char[]> memory_;
    size_t size_ = 0;
    T* at_ = nullptr;
};
